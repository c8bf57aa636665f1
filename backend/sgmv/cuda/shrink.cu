struct Shrink {
    const u16* x;
    const u16* weights;
    const int* header;  // tiles, largest rank
    const int4* tiles;  // slot, first position, rows, rank
    const int* rows;
    float* h;  // [pieces][h_rows][slices][h_rank]
    long long x_stride, slot_stride, a_unit;
    int in_features, slices, h_rows, h_rank;
    int late;  // the successor reads what the predecessor writes: it may start when that has ended
    int stages, stage_rows;  // of long segments
};

static __device__ __forceinline__ float* h_cell(const Shrink& p, int piece, int position, int row, int rank) {
    const int slice = (row >= rank) + (row >= 2 * rank);  // of three at most
    return p.h + (((long long)piece * p.h_rows + position) * p.slices + slice) * p.h_rank + (row - slice * rank);
}

// What a block of a shrink works on: a tile, a piece of `in`, and `height` rows of A from `block` on.
struct ShrinkItem {
    int index, piece, block;
    int4 tile;

    // The first item from `from` on whose block lies inside its adapter's rank; index >= items if there is none.
    __device__ __forceinline__ void seek(const Shrink& p, int from, int items, int pieces, int blocks, int block_rows) {
        for (index = from; index < items; index += gridDim.x) {
            block = index % blocks;
            piece = index / blocks % pieces;
            tile = p.tiles[index / blocks / pieces];
            if (block * block_rows < p.slices * tile.w) return;
        }
    }
};

// A lane's 32 of the 128 columns of a run of a row of A, or of x, of which `left` are there; zeros for the others. FEW: whole runs
// without predicates, on an H100 faster with tiles of eight rows and slower with those of sixteen.
template <bool WEIGHTS, bool FEW>
static __device__ __forceinline__ void load_run(uint4 (&v)[4], const u16* from, int left, int q) {
    auto load = [&](int s) { return WEIGHTS ? load_weight(from + 32 * s) : load_row(from + 32 * s); };
    if (FEW && left >= RUN) {
#pragma unroll
        for (int s = 0; s < 4; s++) v[s] = load(s);
    } else {
#pragma unroll
        for (int s = 0; s < 4; s++) v[s] = q * 8 + 32 * s < left ? load(s) : make_uint4(0, 0, 0, 0);
    }
}

// What a lane gets past the adapter's last row of A, zeros or that row again, only makes ranks that nobody reads.
template <bool FEW>
static __device__ __forceinline__ void load_a(uint4 (&a0)[4], uint4 (&a1)[4], const Shrink& p, const ShrinkItem& item,
                                              int warp, int g, int q) {
    const int first = item.piece * PIECE + warp * RUN, row = item.block * 16 + g, height = p.slices * item.tile.w;
    const u16* a = p.weights + item.tile.x * p.slot_stride + item.tile.w * p.a_unit + first + q * 8;
    auto load = [&](uint4 (&v)[4], int row) {
        const int left = FEW || row < height ? p.in_features - first : 0;
        load_run<true, FEW>(v, a + (long long)(FEW ? min(row, height - 1) : row) * p.in_features, left, q);
    };
    load(a0, row);
    load(a1, row + 8);
}

// Short segments: a block is one (tile of 8 * NT rows, piece) and, where there is work for all blocks in that, all of
// A's rows; else 16 of them. Its 8 warps take one run each. The next 16 rows of A, whichever item they belong to, and the
// next item's x are fetched while this one's partials are added up.
template <int NT>
static __device__ __forceinline__ void shrink_short(const Shrink& p) {
    __shared__ float partial[2][RUNS][8 * NT * 20];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const int pieces = (p.in_features + PIECE - 1) / PIECE, blocks = (p.slices * p.header[1] + 15) / 16;
    const int span = p.header[0] * pieces >= 2 * (int)gridDim.x ? blocks : 1, spans = blocks / span;
    const int items = p.header[0] * pieces * spans;
    if (!p.late) let_next_start();
    ShrinkItem now;
    uint4 a0[4], a1[4], x[NT][4];
    int row[NT];
    const u16* first_x = p.x;  // NT == 1: the lane's token's, from its columns of the run on
    auto first_column = [&]() { return now.piece * PIECE + warp * RUN; };
    auto rows_of_item = [&]() {
#pragma unroll
        for (int j = 0; j < NT; j++) row[j] = p.rows[now.tile.y + min(j * 8 + g, now.tile.z - 1)];
        // Of few rows before the predecessor has completed; of more, which begin when it has, the successor is let start first.
        if (NT == 1) first_x = (const u16*)computed_here((long long)(p.x + row[0] * p.x_stride + first_column() + q * 8));
    };
    auto load_x = [&]() {
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const u16* from = NT == 1 ? first_x : p.x + row[j] * p.x_stride + first_column() + q * 8;
            load_run<false, NT == 1>(x[j], from, NT == 1 || j * 8 + g < now.tile.z ? p.in_features - first_column() : 0, q);
        }
    };
    now.seek(p, blockIdx.x, items, pieces, spans, 16 * span);
    now.block *= span;
    if (now.index < items) {
        load_a<NT == 1>(a0, a1, p, now, warp, g, q);
        rows_of_item();
    }
    wait_for_previous();
    if (p.late) let_next_start();
    if (now.index < items) load_x();
    for (int parity = 0; now.index < items; parity ^= 1) {
        const int4 tile = now.tile;
        const int piece = now.piece, block = now.block, height = p.slices * tile.w;
        now.block++;
        const bool fresh = now.block % span == 0 || now.block * 16 >= height;
        if (fresh) {
            now.seek(p, now.index + gridDim.x, items, pieces, spans, 16 * span);
            now.block *= span;
            if (now.index < items) rows_of_item();
        }
        float acc[NT][4];
        one_run<NT>(acc, a0, a1, x);
        if (now.index < items) {
            load_a<NT == 1>(a0, a1, p, now, warp, g, q);
            if (fresh) load_x();
        }
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                partial[parity][warp][(j * 8 + 2 * q + (i & 1)) * 20 + g + (i >> 1) * 8] = acc[j][i];
        __syncthreads();
        for (int cell = threadIdx.x; cell < 8 * NT * 16; cell += blockDim.x) {
            const int token = cell >> 4, r = block * 16 + (cell & 15);
            if (token < tile.z && r < height) {
                float sum = 0.f;
#pragma unroll
                for (int w = 0; w < RUNS; w++) sum += partial[parity][w][token * 20 + (cell & 15)];
                *h_cell(p, piece, tile.y + token, r, tile.w) = sum;
            }
        }
    }
}

#define LONG_ROWS 64  // of a tile

// Long segments: a block is one (tile of 64 rows, piece, 16 * BLOCKS rows of A); each of its 8 warps walks the piece's
// runs for 16 of the rows and every second 16 rows of A. A stage of shared memory is a run of x and of A; `stages` of them are filled ahead, across items.
template <int BLOCKS>
static __device__ __forceinline__ void run_shrink_long(const Shrink& p) {
    extern __shared__ __align__(16) u16 memory[];  // [stages][stage_rows][RUN], x before A
    constexpr int EACH = BLOCKS / 2;  // blocks of 16 rows of A of a warp
    const int half = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const int pieces = (p.in_features + PIECE - 1) / PIECE, stage = p.stage_rows * RUN;
    const int spans = (p.slices * p.header[1] + 16 * BLOCKS - 1) / (16 * BLOCKS);
    const int items = p.header[0] * pieces * spans;
    const int chunk = threadIdx.x & 15, line = threadIdx.x >> 4;  // of the 16 lines a pass of 256 threads copies
    u16* const mine = memory + staged(line, chunk);
    auto runs_of = [&](int piece) { return (min(PIECE, p.in_features - piece * PIECE) + RUN - 1) / RUN; };
    if (!p.late) let_next_start();
    ShrinkItem ahead, now;
    int ahead_run = 0, filled = 0, used = 0, height_left = 0;
    u32 lines = 0, row[LONG_ROWS / 16];  // bits of the lines of x that are there, first elements of their rows
    const u16* a = p.weights;            // of the item and of this thread
    auto point = [&]() {
        const int4 tile = ahead.tile;
        const int first = ahead.block * 16 * BLOCKS;
        height_left = p.slices * tile.w - first - line;
        a = p.weights + tile.x * p.slot_stride + tile.w * p.a_unit + (long long)(first + line) * p.in_features + ahead.piece * PIECE + chunk * 8;
        lines = 0;
#pragma unroll
        for (int i = 0; i < LONG_ROWS / 16; i++) {
            lines |= u32(line + 16 * i < tile.z) << i;
            row[i] = p.rows[tile.y + min(line + 16 * i, tile.z - 1)] * (u32)p.x_stride;
        }
    };
    auto fetch_a = [&](int run, int to) {
        const bool inside = ahead.piece * PIECE + run * RUN + chunk * 8 < p.in_features;
        u16* stage_a = mine + to * stage + LONG_ROWS * RUN;
        const u16* from = a + run * RUN;
#pragma unroll
        for (int r = 0; r < 16 * BLOCKS; r += 16, from += 16 * p.in_features)
            if (r < height_left + line) copy_async(stage_a + r * RUN, from, inside && r < height_left);
    };
    auto fetch_x = [&](int run, int to) {
        const int k = ahead.piece * PIECE + run * RUN + chunk * 8;
#pragma unroll
        for (int i = 0; i < LONG_ROWS / 16; i++)
            if (lines >> i & 1) copy_async(mine + to * stage + 16 * i * RUN, p.x + k + row[i], k < p.in_features);
    };
    auto fetch = [&](bool with_a) {
        if (ahead.index < items) {
            if (with_a) fetch_a(ahead_run, filled);
            fetch_x(ahead_run, filled);
            filled = filled + 1 == p.stages ? 0 : filled + 1;
            if (++ahead_run == runs_of(ahead.piece)) {
                ahead_run = 0;
                ahead.seek(p, ahead.index + gridDim.x, items, pieces, spans, 16 * BLOCKS);
                if (ahead.index < items) point();
            }
        }
        commit_copies();
    };
    ahead.seek(p, blockIdx.x, items, pieces, spans, 16 * BLOCKS);
    now = ahead;
    if (now.index < items) point();
    const int early = now.index < items ? min(p.stages - 1, runs_of(now.piece)) : 0;
    for (int run = 0; run < early; run++) fetch_a(run, run);
    wait_for_previous();
    if (p.late) let_next_start();
    for (int i = 0; i < p.stages - 1; i++) fetch(i >= early);
    for (; now.index < items; now.seek(p, now.index + gridDim.x, items, pieces, spans, 16 * BLOCKS)) {
        const int4 tile = now.tile;
        const int height = p.slices * tile.w, r0 = now.block * 16 * BLOCKS, runs = runs_of(now.piece);
        float sum[EACH][2][4];
#pragma unroll
        for (int i = 0; i < EACH * 8; i++) sum[i >> 3][i >> 2 & 1][i & 3] = 0.f;
        for (int run = 0; run < runs; run++) {
            wait_for_copies_but(p.stages - 2);
            __syncthreads();
            fetch(true);
            const u16* at = memory + used * stage;
            used = used + 1 == p.stages ? 0 : used + 1;
            auto read = [&](int first, int s) { return *(const uint4*)(at + first * RUN + staged(g, s * 4 + q)); };
            uint4 x[2][4];
#pragma unroll
            for (int i = 0; i < 8; i++) x[i >> 2][i & 3] = read(warp * 16 + (i >> 2) * 8, i & 3);
#pragma unroll
            for (int c = 0; c < EACH; c++) {
                const int first = (2 * c + half) * 16;
                if (r0 + first >= height) continue;
                uint4 a0[4], a1[4];
#pragma unroll
                for (int s = 0; s < 4; s++) a0[s] = read(LONG_ROWS + first, s), a1[s] = read(LONG_ROWS + first + 8, s);
                float acc[2][4];
                one_run<2>(acc, a0, a1, x);
#pragma unroll
                for (int i = 0; i < 8; i++) sum[c][i >> 2][i & 3] += acc[i >> 2][i & 3];
            }
        }
#pragma unroll
        for (int c = 0; c < EACH; c++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int token = warp * 16 + (i >> 2) * 8 + 2 * q + (i & 1), r = r0 + (2 * c + half) * 16 + g + (i >> 1 & 1) * 8;
                if (token < tile.z && r < height) *h_cell(p, now.piece, tile.y + token, r, tile.w) = sum[c][i >> 2][i & 3];
            }
    }
}

KERNEL(shrink_short_1, 256, 3, Shrink, shrink_short<1>)
KERNEL(shrink_short_2, 256, 2, Shrink, shrink_short<2>)
KERNEL(shrink_long_4, 256, 2, Shrink, run_shrink_long<4>)
KERNEL(shrink_long_2, 256, 2, Shrink, run_shrink_long<2>)

// Add the partials of long segments once, so that no column group of an expand has to: cells [pieces][cells] -> [0].
extern "C" __global__ __launch_bounds__(256) void settle(float* h, int pieces, int cells) {
    let_next_start();
    wait_for_previous();
    const int at = (blockIdx.x * 256 + threadIdx.x) * 4;
    if (at >= cells) return;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
    for (int piece = 0; piece < pieces; piece++) {
        const float4 v = *(const float4*)(h + (long long)piece * cells + at);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    *(float4*)(h + at) = sum;
}
