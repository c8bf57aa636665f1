// Long segments: tiles of 64 rows, cut into units of `long_run` times 128 columns, of which all blocks have as many, one
// after the other. A block's 8 warps take 16 rows and 64 of 128 columns each. A stage of shared memory is 128 columns of
// y's rows and of B's; `stages` of them are filled ahead, across items. PAIRED: each 128 columns of gate, then those of up.

static __device__ __forceinline__ int stage_rows(const Expand& p) { return LONG_ROWS + p.h_rank + (p.ahead ? 16 : 0); }

struct LongItem {  // what a block takes together: columns `first` to `last` of a slice of a tile
    int at, end;   // units: what is left of the block's share after it
    int slice, first, last;
    int4 tile;
    bool valid;

    __device__ __forceinline__ void begin(const Expand& p, int tiles) {
        const int all = tiles * (p.groups[0] + p.groups[1] + p.groups[2]);
        const int each = all / gridDim.x, left = all - each * gridDim.x, block = blockIdx.x;
        at = each * block + min(block, left), end = at + each + (block < left);
        move(p);
    }
    __device__ __forceinline__ void move(const Expand& p) {
        valid = at < end;
        if (!valid) return;
        const int all = p.groups[0] + p.groups[1] + p.groups[2];
        const int number = at / all;
        int unit = at - number * all;
        tile = p.tiles[number], slice = 0;
        if (unit >= p.groups[0]) unit -= p.groups[0], slice = 1;
        if (slice == 1 && unit >= p.groups[1]) unit -= p.groups[1], slice = 2;
        const int count = min(p.groups[slice] - unit, end - at);
        at += count;
        first = unit * p.long_run * 128, last = min(p.width[slice], first + count * p.long_run * 128);
    }
};

template <bool PAIRED>
struct LongCopies {
    u16* to;          // where this thread's lines lie in the first stage
    const u16 *y, *b;  // what it copies next of gate, or of the slice; `up` and `ahead`: how far B of up and the next A are from it
    long long up, ahead;
    LongItem item;
    int left, columns, width, slice, filled, line, chunk;  // columns left of the item, and of the slice from this thread's on
    u32 lines, row[LONG_ROWS / 16];                          // bits of the lines that are there, first elements of their rows

    __device__ __forceinline__ void point(const Expand& p) {
        if (!item.valid) return;
        const int4 tile = item.tile;
        const int first = item.first;
        width = p.width[item.slice], left = item.last - first, columns = width - first - chunk * 8;
        y = p.y + p.begin[item.slice] + first + chunk * 8;
        b = p.weights + tile.x * p.slot_stride + tile.w * p.b_unit[item.slice] + (long long)line * width + first + chunk * 8;
        up = tile.w * (p.b_unit[1] - p.b_unit[0]), ahead = tile.w * (p.ahead_unit - p.b_unit[0]);
        lines = 0;
#pragma unroll
        for (int i = 0; i < LONG_ROWS / 16; i++) {
            lines |= u32(line + 16 * i < tile.z) << i;
            row[i] = p.rows[tile.y + min(line + 16 * i, tile.z - 1)] * (u32)p.y_stride;
        }
    }
    __device__ __forceinline__ void copy_weights(u16* stage, const u16* from) {
        for (int r = line; r < (item.tile.w + 15) / 16 * 16; r += 16, stage += 16 * 128, from += 16 * width)
            copy_async(stage, from, columns > 0 && r < item.tile.w);
    }
    __device__ __forceinline__ void fetch(const Expand& p) {
        if (item.valid) {
            u16* stage = to + filled * stage_rows(p) * 128;
            const u16* from = PAIRED && slice ? y + (p.begin[1] - p.begin[0]) : y;
#pragma unroll
            for (int i = 0; i < LONG_ROWS / 16; i++)
                if (lines >> i & 1) copy_async(stage + 16 * i * 128, from + row[i], columns > 0);
            copy_weights(stage + LONG_ROWS * 128, PAIRED && slice ? b + up : b);
            if (PAIRED && slice && p.ahead) copy_weights(stage + (LONG_ROWS + 16) * 128, b + ahead);
            filled = filled + 1 == p.stages ? 0 : filled + 1;
            if (PAIRED) slice ^= 1;
            if (!PAIRED || slice == 0) y += 128, b += 128, left -= 128, columns -= 128;
            if (left <= 0) {
                item.move(p);
                point(p);
            }
        }
        commit_copies();
    }
    // Fills the first stages, waits for what is before; returns the block's first item.
    __device__ __forceinline__ LongItem begin(const Expand& p, u16* memory) {
        let_next_start();
        chunk = threadIdx.x & 15, line = threadIdx.x >> 4;  // of the 16 lines that a pass copies
        to = memory + staged(line, chunk);
        slice = filled = 0;
        item.begin(p, p.header[0]);
        const LongItem first = item;
        point(p);
        for (int i = 0; i < p.stages - 1; i++) fetch(p);
        wait_for_previous();
        return first;
    }
};

// What a warp has to do with a stage: 16 rows of the tile from `mine` on, 64 of the 128 columns from 64 * `half` on. The warp of
// the other half has the same rank vectors.
struct LongWarp {
    int half, mine, lane, g, q;

    __device__ __forceinline__ LongWarp() {
        half = threadIdx.x >> 7, mine = threadIdx.x >> 1 & 48, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    }
    __device__ __forceinline__ void meet_other() const { meet_at(1 + mine / 16, 64); }
};

// The product of a stage's B and the rank vectors in `h`: of token [j] 2q + i, c[m][j][i] and c[m][j][2 + i] are its columns m and 4 + m of eight.
static __device__ __forceinline__ void multiply_stage(float (&c)[4][2][4], const u16* stage, const uint4* h, int rank, const LongWarp& warp) {
#pragma unroll
    for (int n = 0; n < 32; n++) c[n >> 3][n >> 2 & 1][n & 3] = 0.f;
    auto add = [&](int block) {
        uint4 b[4], f[2];  // rank rows 2q, 2q + 1, 2q + 8, 2q + 9
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u16* at = stage + (LONG_ROWS + block * 16 + (i & 2) * 4) * 128;
            b[i] = *(const uint4*)(at + staged(2 * warp.q + (i & 1), warp.half * 8 + warp.g));
        }
#pragma unroll
        for (int j = 0; j < 2; j++) f[j] = h[(block * 2 + j) * 32 + warp.lane];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 pick = i & 1 ? 0x7632 : 0x5410;
            const u32 a0 = __byte_perm(word(b[0], i >> 1), word(b[1], i >> 1), pick);
            const u32 a1 = __byte_perm(word(b[0], 2 + (i >> 1)), word(b[1], 2 + (i >> 1)), pick);
            const u32 a2 = __byte_perm(word(b[2], i >> 1), word(b[3], i >> 1), pick);
            const u32 a3 = __byte_perm(word(b[2], 2 + (i >> 1)), word(b[3], 2 + (i >> 1)), pick);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                mma(c[i][j], a0, a1, a2, a3, f[j].x, f[j].y);
                mma(c[i][j], a0, a1, a2, a3, f[j].z, f[j].w);
            }
        }
    };
    add(0);
    for (int block = 1; block * 16 < rank; block++) add(block);
}

// Eight columns of y of token [j] 2q + i plus the delta, rounded.
static __device__ __forceinline__ uint4 long_sum(const float (&c)[4][2][4], float scale, const u16* stage, int j, int i, const LongWarp& warp) {
    const uint4 y = *(const uint4*)(stage + staged(warp.mine + j * 8 + 2 * warp.q + i, warp.half * 8 + warp.g));
    u32 out[4];
#pragma unroll
    for (int m = 0; m < 4; m++) {
        const u32 old = word(y, m);
        out[m] = pack(fmaf(c[2 * m & 3][j][(m & 2) + i], scale, widen(old, 0)), fmaf(c[2 * m + 1 & 3][j][(m & 2) + i], scale, widen(old, 1)));
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

struct LongTarget {  // where this lane's tokens go, null for those that the tile does not have
    u16* row[2][2];

    __device__ __forceinline__ void aim(const Expand& p, const int4& tile, u16* to, long long stride, const LongWarp& warp) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int token = warp.mine + (n >> 1) * 8 + 2 * warp.q + (n & 1);
            row[n >> 1][n & 1] = token < tile.z ? to + p.rows[tile.y + token] * stride + warp.half * 64 + warp.g * 8 : nullptr;
        }
    }
    __device__ __forceinline__ void store(const uint4& sum, int j, int i, int at, bool inside) const {
        if (row[j][i] && inside) *(uint4*)(row[j][i] + at) = sum;
    }
};

static __device__ __forceinline__ void run_expand_long(const Expand& p) {
    extern __shared__ __align__(16) u16 memory[];  // [stages][stage_rows][128], then fragments
    const LongWarp warp;
    const int stage_size = stage_rows(p) * 128;
    uint4* h = (uint4*)(memory + p.stages * stage_size) + warp.mine / 16 * (p.h_rank / 16) * 2 * 32;
    LongCopies<false> copies;
    int used = 0;
    for (LongItem now = copies.begin(p, memory); now.valid; now.move(p)) {
        const int4 tile = now.tile;
        LongTarget target;
        target.aim(p, tile, p.y + p.begin[now.slice], p.y_stride, warp);
        const float scale = p.scaling[tile.x];
        warp.meet_other();
        gather_h<2, 7>(p, (u32*)h, tile, now.slice, warp.mine, 16, warp.half * 32 + warp.lane, 64);
        warp.meet_other();
        for (int column = now.first; column < now.last; column += 128) {
            wait_for_copies_but(p.stages - 2);
            __syncthreads();
            copies.fetch(p);
            const u16* stage = memory + used * stage_size;
            used = used + 1 == p.stages ? 0 : used + 1;
            float c[4][2][4];
            multiply_stage(c, stage, h, tile.w, warp);
            const bool inside = column + warp.half * 64 + warp.g * 8 < now.last;
#pragma unroll
            for (int n = 0; n < 4; n++) target.store(long_sum(c, scale, stage, n >> 1, n & 1, warp), n >> 1, n & 1, column, inside);
        }
    }
}

KERNEL(expand_long, 256, 2, Expand, run_expand_long)
