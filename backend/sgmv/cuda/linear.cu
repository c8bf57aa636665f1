// Where 16-byte chunk `chunk` of a 128-byte row lies in shared memory: odd rows keep their halves swapped, so that
// eight lanes reading 16 bytes each from two rows meet no bank twice.
static __device__ __forceinline__ int swizzled(int row, int chunk) { return row * 64 + (chunk ^ (row & 1) * 4) * 8; }

struct Linear {
    const u16* x;
    const u16* w;  // [out][in]
    u16* y;
    const int* row_slots;  // null: no row has an adapter
    long long x_stride, y_stride;
    int rows, in_features, out_features, eights;  // eights: rows of a tile of `lora`, by eight
    Expand lora;
};

// B h for each tile of `linear`, a tile ahead of it. A lane has 2 * MT columns next to each other, or two of each slice if
// GATED; of two, the first is a row of mma's upper eight and the second of its lower. UNITS times sixteen ranks of B are on
// their way at once.
template <int MT, int NT, bool GATED>
static __device__ __forceinline__ void few_deltas(const Linear& p, Adapted<8 * NT>& adapted, u32* h, float* deltas, int tiles,
                                                  int thread) {
    constexpr int C = 16 * MT, ROWS = 8 * NT, UNITS = 8 / MT, WARPS = HELPERS / 32, MINE = GATED ? 2 : 2 * MT;
    const int warp = thread >> 5, lane = thread & 31, g = lane >> 2, q = lane & 3;
    for (int i = thread; i < 2 * ROWS * C; i += HELPERS) deltas[i] = NO_DELTA;
    adapted.load(p.lora, p.row_slots, p.rows, p.eights, thread, 1, 0, 1);
    const int items = p.lora.header[0] * p.eights;
    Item now, ahead;
    u32 b[UNITS][4][MT];
    int gathered = -1, number = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, number++) {
        const int first = tile * (GATED ? 16 : C), slice = GATED ? 0 : slice_of(p.lora, first);
        const int column = first - p.lora.begin[slice] + MINE * g;
        const int width = p.lora.width[slice];
        auto fetch = [&]() {
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                if (!ahead.valid) return;
                const int r0 = ahead.block * 16 + 2 * q;
                const u16* adapter = p.lora.weights + ahead.tile.x * p.lora.slot_stride;
                const u16* from = adapter + ahead.tile.w * p.lora.b_unit[slice] + (long long)r0 * width + column;
                const long long across = GATED ? ahead.tile.w * (p.lora.b_unit[1] - p.lora.b_unit[0]) : 0;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int r = (i & 1) + (i >> 1) * 8;
                    const u16* at = from + (long long)r * width;
                    const bool inside = r0 + r < ahead.tile.w;
                    if (GATED) {
                        b[u][i][0] = inside ? __ldg((const u32*)at) : 0;
                        b[u][i][MT - 1] = inside ? __ldg((const u32*)(at + across)) : 0;
                    } else if (MT == 2) {
                        const uint2 v = inside ? __ldg((const uint2*)at) : make_uint2(0, 0);
                        b[u][i][0] = v.x, b[u][i][MT - 1] = v.y;
                    } else {
                        b[u][i][0] = inside ? __ldg((const u32*)at) : 0;
                    }
                }
                if (++ahead.block * 16 >= ahead.tile.w) ahead.seek(adapted.tiles, items, p.eights, ahead.index + WARPS, WARPS);
            }
        };
        now.seek(adapted.tiles, items, p.eights, warp, WARPS);
        ahead = now;
        fetch();
        if (gathered < 0) wait_for_previous();
        if (gathered >= 0 && gathered != slice) meet<3>(HELPERS);
        if (gathered != slice) adapted.gather(p.lora, h, p.rows, slice, thread);
        if (GATED && gathered < 0) adapted.gather(p.lora, h + ROWS * (p.lora.h_rank + 4), p.rows, 1, thread);
        gathered = slice;
        float* mine = deltas + (number & 1) * ROWS * C + MINE * g;
        float d[MT][4];
        while (now.valid) {
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                if (!now.valid) break;
                if (now.block == 0)
#pragma unroll
                    for (int i = 0; i < MT * 4; i++) d[i >> 2][i & 3] = 0.f;
                uint4 f = now.fragment(h, p.lora.h_rank, g, q);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    if (GATED && m == 1) f = now.fragment(h + ROWS * (p.lora.h_rank + 4), p.lora.h_rank, g, q);
                    const u32 a0 = __byte_perm(b[u][0][m], b[u][1][m], 0x5410), a1 = __byte_perm(b[u][0][m], b[u][1][m], 0x7632);
                    const u32 a2 = __byte_perm(b[u][2][m], b[u][3][m], 0x5410), a3 = __byte_perm(b[u][2][m], b[u][3][m], 0x7632);
                    mma(d[m], a0, a1, a2, a3, f.x, f.y);
                    mma(d[m], a0, a1, a2, a3, f.z, f.w);
                }
                if (++now.block * 16 < now.tile.w) continue;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int token = now.first + 2 * q + i;
                    if (token >= now.tile.z) continue;
                    float* to = mine + adapted.rows[now.tile.y + token] * C;
                    if (GATED) {
                        *(float2*)to = make_float2(d[0][i], d[0][2 + i]);
                        *(float2*)(to + 16) = make_float2(d[MT - 1][i], d[MT - 1][2 + i]);
                    } else if (MT == 2)
                        *(float4*)to = make_float4(d[0][i], d[0][2 + i], d[MT - 1][i], d[MT - 1][2 + i]);
                    else
                        *(float2*)to = make_float2(d[0][i], d[0][2 + i]);
                }
                now.seek(adapted.tiles, items, p.eights, now.index + WARPS, WARPS);
            }
            fetch();
        }
        __syncthreads();
    }
}

// Four neighbouring columns of a row of y.
static __device__ __forceinline__ void write_four(const Linear& p, int token, int column, const float4& v) {
    u16* to = p.y + token * p.y_stride + column;
    const u32 low = pack(v.x, v.y), high = pack(v.z, v.w);
    if (column + 4 <= p.out_features && ((unsigned long long)to & 7) == 0) {
        *(uint2*)to = make_uint2(low, high);
        return;
    }
    const u16 each[4] = {(u16)low, (u16)(low >> 16), (u16)high, (u16)(high >> 16)};
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (column + i < p.out_features) to[i] = each[i];
}

static __device__ __forceinline__ float4 gated(const float4& gate, const float4& up) {
    auto rounded = [](float v) { return widen(pack(v, 0.f), 0); };
    return make_float4(swiglu(rounded(gate.x), rounded(up.x)), swiglu(rounded(gate.y), rounded(up.y)),
                       swiglu(rounded(gate.z), rounded(up.z)), swiglu(rounded(gate.w), rounded(up.w)));
}

// The base product of at most 8 * NT rows, bound by reading w once: a block is 16 * MT rows of w, eight of its warps take
// 64 columns in turn, streamed with x through rings of their own. The first of w do not wait for x. GATED: w is gate's rows,
// then up's, sixteen of each a tile, and y is silu(gate) * up of the rounded products, with the bits of `swiglu` after them.
template <int MT, int NT, int DEPTH, bool GATED = false>
static __device__ __forceinline__ void linear(const Linear& p) {
    constexpr int STAGE = (16 * MT + 8 * NT) * 64, STRIDE = 16 * MT + 4;
    // [8 warps][DEPTH][w: 16 * MT, x: 8 * NT][64], then sums; a row of 128 bytes is copied faster if it is aligned to as many.
    extern __shared__ __align__(128) u16 aligned_memory[];
    u16* memory = aligned_memory;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    u16* ring = memory + warp * DEPTH * STAGE;
    float* sums = (float*)(memory + 8 * DEPTH * STAGE);  // [8 warps][8 * NT][STRIDE]
    float* deltas = sums + 8 * 8 * NT * STRIDE;          // [2][8 * NT][16 * MT], for tiles in turn; then h
    __shared__ Adapted<8 * NT> adapted;
    constexpr int TILE = GATED ? 16 : 16 * MT;  // columns of y
    const int half = p.out_features / 2, steps = (p.in_features + 63) / 64;
    const int tiles = ((GATED ? half : p.out_features) + TILE - 1) / TILE;
    const int spot = swizzled(lane >> 3, lane & 7);
    let_next_start();
    if (warp >= 8) {
        few_deltas<MT, NT, GATED>(p, adapted, (u32*)(deltas + 2 * 8 * NT * 16 * MT), deltas, tiles, threadIdx.x - 256);
        return;
    }
    struct Cursor {
        int tile, step, slot;
    } w_next = {(int)blockIdx.x, warp, 0}, x_next = w_next;
    auto advance = [&](Cursor& at) {
        at.slot = at.slot + 1 == DEPTH ? 0 : at.slot + 1;
        at.step += 8;
        if (at.step >= steps) at.step = warp, at.tile += gridDim.x;
    };
    auto fetch_w = [&]() {
        if (w_next.tile < tiles) {
            const int k = w_next.step * 64 + (lane & 7) * 8, row = w_next.tile * TILE + (lane >> 3);
            const u16* from = p.w + (long long)row * p.in_features + k;
#pragma unroll
            for (int i = 0; i < 4 * MT; i++) {
                const int down = GATED && i >= 4 ? half + 4 * i - 16 : 4 * i;
                copy_async(ring + w_next.slot * STAGE + spot + i * 256, from + (long long)down * p.in_features,
                           k < p.in_features && row + down < p.out_features);
            }
            advance(w_next);
        }
    };
    auto fetch_x = [&]() {
        if (x_next.tile < tiles) {
            const int k = x_next.step * 64 + (lane & 7) * 8, row = lane >> 3;
            const u16* from = p.x + row * p.x_stride + k;
#pragma unroll
            for (int i = 0; i < 2 * NT; i++)
                copy_async(ring + x_next.slot * STAGE + 16 * MT * 64 + spot + i * 256,
                           from + 4ll * i * p.x_stride, k < p.in_features && row + 4 * i < p.rows);
            advance(x_next);
        }
    };
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) {
        fetch_w();
        commit_copies();
    }
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) {
        fetch_x();
        commit_copies();
    }
    int used = 0, number = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, number++) {
        float c[MT][NT][4];
#pragma unroll
        for (int i = 0; i < MT * NT * 4; i++) c[i / (NT * 4)][i / 4 % NT][i & 3] = 0.f;
        for (int step = warp; step < steps; step += 8) {
            fetch_w();
            fetch_x();
            commit_copies();
            wait_for_copies<DEPTH - 1>();
            __syncwarp();
            const u16* at = ring + used * STAGE;
#pragma unroll
            for (int s = 0; s < 2; s++) {
                uint4 x[NT];
#pragma unroll
                for (int j = 0; j < NT; j++) x[j] = *(const uint4*)(at + swizzled((2 * MT + j) * 8 + g, s * 4 + q));
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    const uint4 a0 = *(const uint4*)(at + swizzled(m * 16 + g, s * 4 + q));
                    const uint4 a1 = *(const uint4*)(at + swizzled(m * 16 + 8 + g, s * 4 + q));
#pragma unroll
                    for (int j = 0; j < NT; j++) {
                        mma(c[m][j], a0.x, a1.x, a0.y, a1.y, x[j].x, x[j].y);
                        mma(c[m][j], a0.z, a1.z, a0.w, a1.w, x[j].z, x[j].w);
                    }
                }
            }
            used = used + 1 == DEPTH ? 0 : used + 1;
            __syncwarp();
        }
        meet<1>(256);
        float* mine = sums + warp * 8 * NT * STRIDE;
#pragma unroll
        for (int i = 0; i < MT * NT * 4; i++)
            mine[(i / 4 % NT * 8 + 2 * q + (i & 1)) * STRIDE + i / (NT * 4) * 16 + g + (i >> 1 & 1) * 8] =
                c[i / (NT * 4)][i / 4 % NT][i & 3];
        __syncthreads();
        const float* delta = deltas + (number & 1) * 8 * NT * 16 * MT;
        auto product = [&](int token, int column) {
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int w = 0; w < 8; w++) {
                const float4 v = *(const float4*)(sums + (w * 8 * NT + token) * STRIDE + column);
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            if (!p.row_slots) return sum;
            const float4 d = *(const float4*)(delta + token * 16 * MT + column);
            const float scale = adapted.scales[token];
            return make_float4(plus(sum.x, d.x, scale), plus(sum.y, d.y, scale), plus(sum.z, d.z, scale), plus(sum.w, d.w, scale));
        };
        for (int cell = threadIdx.x * 4; cell < p.rows * TILE; cell += 1024) {
            const int token = cell / TILE, column = cell % TILE;
            float4 value = product(token, column);
            if (GATED) value = gated(value, product(token, 16 + column));
            write_four(p, token, tile * TILE + column, value);
        }
    }
}

KERNEL(linear_8, 384, 1, Linear, linear<1 COMMA 1 COMMA 5>)
KERNEL(linear_16, 384, 1, Linear, linear<1 COMMA 2 COMMA 4>)
KERNEL(linear_32, 384, 1, Linear, linear<2 COMMA 4 COMMA 2>)
KERNEL(linear_gated_8, 384, 1, Linear, linear<2 COMMA 1 COMMA 3 COMMA true>)
KERNEL(linear_gated_16, 384, 1, Linear, linear<2 COMMA 2 COMMA 3 COMMA true>)
KERNEL(linear_gated_32, 384, 1, Linear, linear<2 COMMA 4 COMMA 2 COMMA true>)
