struct Expand {
    const float* h;
    const u16* weights;
    const float* scaling;
    const int* header;
    const int4* tiles;
    const int* rows;
    u16* y;
    u16* activated;        // where gate and up go together (expand_long_swiglu)
    const int* row_slots;  // of all `h_rows` rows, for those that no tile has
    long long y_stride, slot_stride, activated_stride;
    long long b_unit[3];
    int width[3], begin[3], groups[3];  // per slice: columns, first column of y, column groups
    int slices, pieces, h_rows, h_rank;
    int long_run, stages;  // of long segments
    float* ahead;          // with `activated`: where its shrink by the next linear goes, of ranks of at most 16; or null
    long long ahead_unit;  // a_unit of that linear
};

// What a block of an expand works on: a tile and a group of columns of one slice. Items count groups first.
struct ExpandItem {
    int number, flat, slice, group;  // tile number, group over all slices and inside its slice
    int4 tile;
    bool valid;

    __device__ __forceinline__ void move(const Expand& p, int tiles, int by, const int (&groups)[3]) {
        const int all = groups[0] + groups[1] + groups[2];
        flat += by % all, number += by / all;
        if (flat >= all) flat -= all, number++;
        valid = number < tiles;
        if (!valid) return;
        group = flat, slice = 0;
        if (group >= groups[0]) group -= groups[0], slice = 1;
        if (slice == 1 && group >= groups[1]) group -= groups[1], slice = 2;
        tile = p.tiles[number];
    }
    __device__ __forceinline__ const u16* b(const Expand& p) const {
        return p.weights + tile.x * p.slot_stride + tile.w * p.b_unit[slice];
    }
};

// h is kept as the sum of two numbers of the weights' type: as good as float32 beside the rounding of y.
template <int NT>
static __device__ __forceinline__ void multiply(float (&c)[8][NT][4], const uint4 (&b)[8], const uint4 (&f)[NT]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u32 pick = i & 1 ? 0x7632 : 0x5410;
        const u32 a0 = __byte_perm(word(b[0], i >> 1), word(b[1], i >> 1), pick);
        const u32 a1 = __byte_perm(word(b[4], i >> 1), word(b[5], i >> 1), pick);
        const u32 a2 = __byte_perm(word(b[2], i >> 1), word(b[3], i >> 1), pick);
        const u32 a3 = __byte_perm(word(b[6], i >> 1), word(b[7], i >> 1), pick);
#pragma unroll
        for (int j = 0; j < NT; j++) {
            mma(c[i][j], a0, a1, a2, a3, f[j].x, f[j].y);
            mma(c[i][j], a0, a1, a2, a3, f[j].z, f[j].w);
        }
    }
}

template <int NT>
static __device__ __forceinline__ void multiply(float (&c)[8][NT][4], const uint4 (&b)[8], const uint4* h, int lane) {
    uint4 f[NT];
#pragma unroll
    for (int j = 0; j < NT; j++) f[j] = h[j * 32 + lane];
    multiply<NT>(c, b, f);
}

// The rank vectors of tokens `mine`..`mine + tokens - 1` of a tile: partials added in order, rounded, kept in shared
// memory as mma fragments. `threads` threads share the work, four pairs of ranks at a time.
// CELLS of them a thread at a time, the loads of PIECES partials of each on their way together.
template <int NT, int CELLS, int PIECES>
static __device__ __forceinline__ void gather_cells(const Expand& p, u32* h, const int4& tile, int slice, int mine, int tokens,
                                                    int thread, int threads) {
    const long long step = (long long)p.h_rows * p.slices * p.h_rank;
    const int pairs = (tile.w + 15) / 16 * 8, total = min(tokens, tile.z - mine) * pairs;
    for (int start = thread; start < total; start += CELLS * threads) {
        const float* from[CELLS];
        float low[CELLS], high[CELLS];
#pragma unroll
        for (int u = 0; u < CELLS; u++) {
            const int i = min(start + u * threads, total - 1), token = i / pairs, pair = i - token * pairs;
            from[u] = p.h + ((long long)(tile.y + mine + token) * p.slices + slice) * p.h_rank + 2 * pair;
            low[u] = high[u] = 0.f;
        }
        for (int first = 0; first < p.pieces; first += PIECES) {
            float2 v[PIECES][CELLS];
#pragma unroll
            for (int n = 0; n < PIECES * CELLS; n++) {
                const int piece = first + n / CELLS, u = n % CELLS;
                const bool there = piece < p.pieces && start + u * threads < total;
                v[n / CELLS][u] = there ? *(const float2*)(from[u] + piece * step) : make_float2(0.f, 0.f);
            }
#pragma unroll
            for (int n = 0; n < PIECES * CELLS; n++) {
                const float2 part = v[n / CELLS][n % CELLS];
                low[n % CELLS] += part.x, high[n % CELLS] += part.y;
            }
        }
#pragma unroll
        for (int u = 0; u < CELLS; u++) {
            const int i = start + u * threads, token = i / pairs, pair = i - token * pairs;
            // Cells past the rank hold what an earlier step left there.
            const float first = 2 * pair < tile.w ? low[u] : 0.f, second = 2 * pair + 1 < tile.w ? high[u] : 0.f;
            const u32 value = pack(first, second);
            u32* to = h + (((pair >> 3) * NT + (token >> 3)) * 32 + (token & 7) * 4 + (pair & 3)) * 4 + (pair >> 2 & 1);
            if (i < total) to[0] = value, to[2] = pack(first - widen(value, 0), second - widen(value, 1));
        }
    }
}

template <int NT, int PIECES = 4>
static __device__ __forceinline__ void gather_h(const Expand& p, u32* h, const int4& tile, int slice, int mine, int tokens,
                                                int thread, int threads) {
    if (min(tokens, tile.z - mine) * ((tile.w + 15) / 16 * 8) <= threads)
        gather_cells<NT, 1, 16>(p, h, tile, slice, mine, tokens, thread, threads);
    else
        gather_cells<NT, 4, PIECES>(p, h, tile, slice, mine, tokens, thread, threads);
}

template <int NT>
struct Target {  // this lane's tokens in y: 2q, 2q + 1 of each eight, and their values in 128 columns
    u16* row[NT][2];
    bool live[NT][2];
    uint4 y[NT][2][2];

    __device__ __forceinline__ void aim(const Expand& p, const int4& tile, int slice, int mine, int q) {
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int token = mine + j * 8 + 2 * q + i;
                live[j][i] = token < tile.z;
                row[j][i] = p.y + p.rows[tile.y + min(token, tile.z - 1)] * p.y_stride + p.begin[slice];
            }
    }
    __device__ __forceinline__ void load(int at, int width) {
#pragma unroll
        for (int n = 0; n < NT * 4; n++) {
            const int j = n >> 2, i = n >> 1 & 1, half = n & 1;
            if (live[j][i] && at + half * 64 < width) y[j][i][half] = load_row(row[j][i] + at + half * 64);
        }
    }
    // y plus the delta: eight columns of a token, rounded.
    __device__ __forceinline__ uint4 sum(const float (&c)[8][NT][4], float scale, int j, int i, int half) const {
        u32 out[4];
#pragma unroll
        for (int m = 0; m < 4; m++) {
            const u32 old = word(y[j][i][half], m);
            out[m] = pack(fmaf(c[2 * m][j][half * 2 + i], scale, widen(old, 0)),
                          fmaf(c[2 * m + 1][j][half * 2 + i], scale, widen(old, 1)));
        }
        return make_uint4(out[0], out[1], out[2], out[3]);
    }
    __device__ __forceinline__ void store(const float (&c)[8][NT][4], float scale, int at, int width) {
#pragma unroll
        for (int n = 0; n < NT * 4; n++) {
            const int j = n >> 2, i = n >> 1 & 1, half = n & 1;
            if (live[j][i] && at + half * 64 < width) *(uint4*)(row[j][i] + at + half * 64) = sum(c, scale, j, i, half);
        }
    }
};

template <int NT>
static __device__ __forceinline__ void clear(float (&c)[8][NT][4]) {
#pragma unroll
    for (int n = 0; n < 8 * NT * 4; n++) c[n / (NT * 4)][n / 4 % NT][n & 3] = 0.f;
}

#define B_ROW (128 + 8)  // columns of B in shared memory, so that eight lanes' 16-byte reads meet no bank twice

// Rank rows 2q, 2q+1, 2q+8, 2q+9 of a block and columns 8g.., 64 + 8g.. of 128: what a lane's mma fragments hold.
static __device__ __forceinline__ void read_b(uint4 (&b)[8], const u16* block, int g, int q) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u16* from = block + (2 * q + (i & 1) + (i >> 1) * 8) * B_ROW + g * 8;
        b[i] = *(const uint4*)from;
        b[i + 4] = *(const uint4*)(from + 64);
    }
}
