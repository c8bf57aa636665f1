// The segment map: rows sorted by slot and cut into tiles of at most `tile_rows` rows of one slot. One block.
extern "C" __global__ __launch_bounds__(1024) void segment_map(const int* row_slots, const int* ranks, int* header,
                                                               int4* tiles, int* rows, int count, int max_loras,
                                                               int tile_rows) {
    extern __shared__ int shared[];
    int* starts = shared;                  // [max_loras + 1] rows before each slot
    int* firsts = starts + max_loras + 1;  // [max_loras + 1] tiles before each slot
    int* cursor = firsts + max_loras + 1;  // [max_loras]
    __shared__ int warp_rows[32], warp_tiles[32], largest;
    const int me = threadIdx.x, lane = me & 31, warp = me >> 5;
    wait_for_previous();
    let_next_start();
    for (int s = me; s < max_loras; s += 1024) cursor[s] = 0;
    if (me == 0) largest = 0;
    __syncthreads();
    for (int t = me; t < count; t += 1024)
        if (row_slots[t] >= 0) atomicAdd(&cursor[row_slots[t]], 1);
    __syncthreads();
    const int share = (max_loras + 1023) / 1024, from = min(me * share, max_loras), to = min(from + share, max_loras);
    int row_sum = 0, tile_sum = 0;
    for (int s = from; s < to; s++) {
        row_sum += cursor[s], tile_sum += (cursor[s] + tile_rows - 1) / tile_rows;
        if (cursor[s] > 0) atomicMax(&largest, ranks[s]);
    }
    int row_scan = row_sum, tile_scan = tile_sum;
    for (int step = 1; step < 32; step <<= 1) {
        const int a = __shfl_up_sync(~0u, row_scan, step), b = __shfl_up_sync(~0u, tile_scan, step);
        if (lane >= step) row_scan += a, tile_scan += b;
    }
    if (lane == 31) warp_rows[warp] = row_scan, warp_tiles[warp] = tile_scan;
    __syncthreads();
    if (warp == 0) {
        int a = warp_rows[lane], b = warp_tiles[lane];
        for (int step = 1; step < 32; step <<= 1) {
            const int c = __shfl_up_sync(~0u, a, step), d = __shfl_up_sync(~0u, b, step);
            if (lane >= step) a += c, b += d;
        }
        warp_rows[lane] = a, warp_tiles[lane] = b;
    }
    __syncthreads();
    int row = row_scan - row_sum + (warp ? warp_rows[warp - 1] : 0);
    int tile = tile_scan - tile_sum + (warp ? warp_tiles[warp - 1] : 0);
    for (int s = from; s < to; s++) {
        starts[s] = row, firsts[s] = tile;
        row += cursor[s], tile += (cursor[s] + tile_rows - 1) / tile_rows;
    }
    const int total = warp_tiles[31];
    if (me == 0) starts[max_loras] = warp_rows[31], firsts[max_loras] = total, header[0] = total, header[1] = largest;
    __syncthreads();
    for (int i = me; i < total; i += 1024) {
        int low = 0, high = max_loras;  // the last slot whose first tile is <= i
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (firsts[middle] <= i) low = middle; else high = middle;
        }
        const int first = starts[low] + (i - firsts[low]) * tile_rows;
        tiles[i] = make_int4(low, first, min(tile_rows, starts[low + 1] - first), ranks[low]);
    }
    for (int s = me; s < max_loras; s += 1024) cursor[s] = starts[s];
    __syncthreads();
    for (int base = 0; base < count; base += 1024) {
        const int t = base + me, slot = t < count ? row_slots[t] : -1;
        const u32 peers = __match_any_sync(~0u, slot);
        const int leader = __ffs(peers) - 1;
        int place = 0;
        if (slot >= 0 && lane == leader) place = atomicAdd(&cursor[slot], __popc(peers));
        place = __shfl_sync(~0u, place, leader) + __popc(peers & ((1u << lane) - 1));
        if (slot >= 0) rows[place] = t;
    }
}
