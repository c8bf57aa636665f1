// The shrink as part of the base product that adds it: each block does a share of it and reads what the others did.

#define EMPTY 0xffffffffu  // no arithmetic makes it: its NaN is 0x7fffffff
#define HEAVY 6            // items of a block

static __device__ __forceinline__ float2 peek(const float* cell) {
    float2 v;
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(cell) : "memory");
    return v;
}

static __device__ __forceinline__ bool empty(float cell) { return __float_as_uint(cell) == EMPTY; }

static __device__ __forceinline__ void hand_over(float* cell, float v) {
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(cell), "f"(v) : "memory");
}

static __device__ __forceinline__ u32 read_now(const u32* at) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

static __device__ __forceinline__ void add_now(u32* at, u32 v) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}

// What the blocks of a grid, no more than run at a time, hand each other without a barrier: a cell is EMPTY until it is written.
// Of two buffers one is filled while the other is emptied for the next launch. The highest bit of `turn` says which, and
// changes when the last block has read it.
struct Exchange {
    float* cells;  // [2][size]; a size of 0: a kernel before has shrunk
    u32* turn;
    long long size;

    // By one thread, after `wait_for_previous`: which buffer is filled now.
    __device__ __forceinline__ u32 take() const {
        const u32 now = read_now(turn);
        add_now(turn, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1);
        return now >> 31;
    }

    __device__ __forceinline__ void clear(u32 buffer, int thread, int threads) const {
        uint4* to = (uint4*)(cells + buffer * size);
        for (long long i = blockIdx.x * threads + thread; i < size / 4; i += gridDim.x * threads)
            to[i] = make_uint4(EMPTY, EMPTY, EMPTY, EMPTY);
    }
};

// Whether shares of the shrink are so large that base weights beyond those fetched early wait for them: of two streams of reads
// each gets as much of the memory as it has under way, and B h can only follow the shrink.
static __device__ __forceinline__ bool heavy(const Shrink& p) {
    const int2 header = *(const int2*)p.header;
    const int pieces = (p.in_features + PIECE - 1) / PIECE, blocks = (p.slices * header.y + 15) / 16;
    return header.x * pieces * blocks > HEAVY * (int)gridDim.x;
}

// A block's share of the shrink, done by HELPERS of its threads: items are 16 rows of A, a piece and at most eight rows of x, of which a
// warp takes one run or two. The first of A is on its way before the predecessor has completed, the next item's A and x while this
// one's partials are added up.
template <int HELPERS>
struct ShrinkShare {
    static constexpr int WARPS = HELPERS / 32, EACH = RUNS / WARPS;  // runs of a warp
    ShrinkItem now;
    const int4* tiles;
    const int* rows;
    int warp, g, q, items, pieces, blocks, row;
    uint4 a0[EACH][4], a1[EACH][4], x[EACH][1][4];

    __device__ __forceinline__ void seek(const Shrink& p, int from) {
        for (now.index = from; now.index < items; now.index += gridDim.x) {
            now.block = now.index % blocks;
            now.piece = now.index / blocks % pieces;
            now.tile = tiles[now.index / blocks / pieces];
            if (now.block * 16 < p.slices * now.tile.w) break;
        }
        if (now.index >= items) return;
#pragma unroll
        for (int i = 0; i < EACH; i++) load_a<true>(a0[i], a1[i], p, now, warp + i * WARPS, g, q);
        row = rows[now.tile.y + min(g, now.tile.z - 1)];
    }

    __device__ __forceinline__ void load_x(const Shrink& p) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int first = now.piece * PIECE + (warp + i * WARPS) * RUN, left = now.index < items ? p.in_features - first : 0;
            const u16* from = p.x + row * p.x_stride + first + q * 8;
#pragma unroll
            for (int s = 0; s < 4; s++) x[i][0][s] = q * 8 + 32 * s < left ? load_row(from + 32 * s) : make_uint4(0, 0, 0, 0);
        }
    }

    // `header` and, in shared memory, `tiles` and `rows` are those of `p`.
    __device__ __forceinline__ void begin(const Shrink& p, int2 header, const int4* tiles, const int* rows, int thread) {
        warp = thread >> 5, g = (thread & 31) >> 2, q = thread & 3;
        this->tiles = tiles, this->rows = rows;
        pieces = (p.in_features + PIECE - 1) / PIECE, blocks = (p.slices * header.y + 15) / 16;
        items = header.x * pieces * blocks;
        seek(p, blockIdx.x);
    }

    // After `wait_for_previous`: to the end; returns the buffer that all blocks fill.
    __device__ __forceinline__ float* finish(const Shrink& p, const Exchange& exchange, float (*partial)[RUNS][8 * 20],
                                             int thread) {
        __shared__ u32 turn;
        load_x(p);
        if (thread == 0) turn = exchange.take();
        for (int parity = 0; now.index < items; parity ^= 1) {
            const int4 tile = now.tile;
            const int piece = now.piece, r = now.block * 16 + (thread & 15), token = thread >> 4;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                float acc[1][4];
                one_run<1>(acc, a0[i], a1[i], x[i]);
#pragma unroll
                for (int n = 0; n < 4; n++)
                    partial[parity][warp + i * WARPS][(2 * q + (n & 1)) * 20 + g + (n >> 1) * 8] = acc[0][n];
            }
            seek(p, now.index + gridDim.x);
            load_x(p);
            meet<3>(HELPERS);
            if (token >= tile.z || r >= p.slices * tile.w) continue;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < RUNS; w++) sum += partial[parity][w][token * 20 + (thread & 15)];
            hand_over(h_cell(p, piece, tile.y + token, r, tile.w) + turn * exchange.size, sum);
        }
        meet<3>(HELPERS);
        const u32 filled = turn;
        exchange.clear(filled ^ 1, thread, HELPERS);
        return exchange.cells + filled * exchange.size;
    }
};
