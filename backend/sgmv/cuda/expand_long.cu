// Long segments: a block is one (tile of 64 rows, `long_run` times 128 columns); its 4 warps take 16 rows each and share B.
// A stage of shared memory is 128 columns of y's rows and of B's; `stages` of them are filled ahead, across items. PAIRED: each
// 128 columns of gate, then those of up.

static __device__ __forceinline__ int stage_rows(const Expand& p) { return LONG_ROWS + p.h_rank + (p.ahead ? 16 : 0); }

template <bool PAIRED>
struct LongCopies {
    u16* to;          // where this thread's lines lie in the first stage
    const u16 *y, *b;  // what it copies next of gate, or of the slice; `up` and `ahead`: how far B of up and the next A are from it
    long long up, ahead;
    ExpandItem item;
    int left, columns, width, slice, filled, line, chunk;  // columns left of the item, and of the slice from this thread's on
    u32 lines, row[LONG_ROWS / 8];                          // bits of the lines that are there, first elements of their rows

    __device__ __forceinline__ void point(const Expand& p) {
        if (!item.valid) return;
        const int4 tile = item.tile;
        const int first = item.group * p.long_run * 128;
        width = p.width[item.slice], left = min(p.long_run * 128, width - first), columns = width - first - chunk * 8;
        y = p.y + p.begin[item.slice] + first + chunk * 8;
        b = p.weights + tile.x * p.slot_stride + tile.w * p.b_unit[item.slice] + (long long)line * width + first + chunk * 8;
        up = tile.w * (p.b_unit[1] - p.b_unit[0]), ahead = tile.w * (p.ahead_unit - p.b_unit[0]);
        lines = 0;
#pragma unroll
        for (int i = 0; i < LONG_ROWS / 8; i++) {
            lines |= u32(line + 8 * i < tile.z) << i;
            row[i] = p.rows[tile.y + min(line + 8 * i, tile.z - 1)] * (u32)p.y_stride;
        }
    }
    __device__ __forceinline__ void copy_weights(u16* stage, const u16* from) {
        for (int r = line; r < (item.tile.w + 15) / 16 * 16; r += 8, stage += 8 * 128, from += 8 * width)
            copy_async(stage, from, columns > 0 && r < item.tile.w);
    }
    __device__ __forceinline__ void fetch(const Expand& p, int tiles) {
        if (item.valid) {
            u16* stage = to + filled * stage_rows(p) * 128;
            const u16* from = PAIRED && slice ? y + (p.begin[1] - p.begin[0]) : y;
#pragma unroll
            for (int i = 0; i < LONG_ROWS / 8; i++)
                if (lines >> i & 1) copy_async(stage + 8 * i * 128, from + row[i], columns > 0);
            copy_weights(stage + LONG_ROWS * 128, PAIRED && slice ? b + up : b);
            if (PAIRED && slice && p.ahead) copy_weights(stage + (LONG_ROWS + 16) * 128, b + ahead);
            filled = filled + 1 == p.stages ? 0 : filled + 1;
            if (PAIRED) slice ^= 1;
            if (!PAIRED || slice == 0) y += 128, b += 128, left -= 128, columns -= 128;
            if (left <= 0) {
                item.move(p, tiles, gridDim.x, p.groups);
                point(p);
            }
        }
        commit_copies();
    }
    // Fills the first stages, waits for what is before; returns the block's first item.
    __device__ __forceinline__ ExpandItem begin(const Expand& p, u16* memory, int tiles) {
        let_next_start();
        chunk = threadIdx.x & 15, line = threadIdx.x >> 4;  // of the 8 lines that a pass copies
        to = memory + staged(line, chunk);
        item.flat = item.number = slice = filled = 0;
        item.move(p, tiles, blockIdx.x, p.groups);
        const ExpandItem first = item;
        point(p);
        for (int i = 0; i < p.stages - 1; i++) fetch(p, tiles);
        wait_for_previous();
        return first;
    }
};

// y's values and the product of 128 columns of a stage, for rows `mine`.. of the tile: 16 of them, with the rank vectors in `h`.
static __device__ __forceinline__ void multiply_stage(float (&c)[8][2][4], Target<2>& target, const u16* stage, const uint4* h, int rank,
                                                      int mine, int lane) {
    const int g = lane >> 2, q = lane & 3;
    const u16* const at[2] = {stage + staged(2 * q, g), stage + staged(2 * q + 1, g)};  // the same bits of rows 8 further
    auto add = [&](int block) {
        uint4 b[8];
#pragma unroll
        for (int i = 0; i < 8; i++) b[i] = *(const uint4*)(at[i & 1] + (LONG_ROWS + block * 16 + (i & 2) * 4) * 128 + (i >> 2) * 64);
        multiply<2>(c, b, h + block * 2 * 32, lane);
    };
    clear<2>(c);
    add(0);
    for (int block = 1; block * 16 < rank; block++) add(block);
#pragma unroll
    for (int n = 0; n < 8; n++)
        target.y[n >> 2][n >> 1 & 1][n & 1] = *(const uint4*)(at[n >> 1 & 1] + (mine + (n >> 2) * 8) * 128 + (n & 1) * 64);
}

static __device__ __forceinline__ void run_expand_long(const Expand& p) {
    extern __shared__ __align__(16) u16 memory[];  // [stages][stage_rows][128], then fragments
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, mine = warp * 16;
    const int stage = stage_rows(p) * 128, tiles = p.header[0];
    uint4* h = (uint4*)(memory + p.stages * stage) + warp * (p.h_rank / 16) * 2 * 32;
    LongCopies<false> copies;
    int used = 0;
    for (ExpandItem now = copies.begin(p, memory, tiles); now.valid; now.move(p, tiles, gridDim.x, p.groups)) {
        const int4 tile = now.tile;
        const int first = now.group * p.long_run * 128, end = min(p.width[now.slice], first + p.long_run * 128);
        Target<2> target;
        target.aim(p, tile, now.slice, mine, q);
        const float scale = p.scaling[tile.x];
        __syncwarp();
        gather_h<2, 7>(p, (u32*)h, tile, now.slice, mine, 16, lane, 32);
        __syncwarp();
        for (int column = first; column < end; column += 128) {
            wait_for_copies_but(p.stages - 2);
            __syncthreads();
            copies.fetch(p, tiles);
            float c[8][2][4];
            multiply_stage(c, target, memory + used * stage, h, tile.w, mine, lane);
            used = used + 1 == p.stages ? 0 : used + 1;
            target.store(c, scale, column + g * 8, end);
        }
    }
}

KERNEL(expand_long, 128, 3, Expand, run_expand_long)
