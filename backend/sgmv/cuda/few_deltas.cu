// What LoRA adds to the base product of few rows, in `linear.cu`, by warps of their own.

struct Linear {
    const u16* x;
    const u16* w;  // [out][in]
    u16* y;
    const int* row_slots;  // null: no row has an adapter
    long long x_stride, y_stride;
    int rows, in_features, out_features, eights;  // eights: rows of a tile of `lora`, by eight
    Expand lora;
    Shrink shrink;
    Exchange exchange;
};

// Products go, tile after tile through two places in turn, from the MAKERS of a block to its FEW_HELPERS, who add LoRA's part.
#define MAKERS 256
#define FEW_HELPERS 256

static __device__ __forceinline__ void arrive_at(int barrier) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(MAKERS + FEW_HELPERS) : "memory");
}

static __device__ __forceinline__ void wait_at(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(MAKERS + FEW_HELPERS) : "memory");
}

#define FULL 4        // and 5: a place
#define EMPTIED 6     // and 7
#define SHARED_OUT 8  // see `heavy`

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

// A share of the shrink, unless it comes before; then B h for each tile of `linear`, added to the products that it hands over. A lane
// has 2 * MT columns next to each other, or two of each slice if GATED; of two, the first is a row of mma's upper eight and the
// second of its lower. UNITS times sixteen ranks of B are on their way at once.
template <int MT, int NT, bool GATED>
static __device__ __forceinline__ void few_deltas(const Linear& p, Adapted<8 * NT, FEW_HELPERS>& adapted, float* deltas,
                                                  const uint2* products, int tiles, int thread) {
    constexpr int C = 16 * MT, ROWS = 8 * NT, UNITS = 8 / MT, HELPERS = FEW_HELPERS, WARPS = HELPERS / 32;
    constexpr int MINE = GATED ? 2 : 2 * MT, TILE = GATED ? 16 : C;
    const int warp = thread >> 5, lane = thread & 31, g = lane >> 2, q = lane & 3;
    constexpr bool SHARED = NT > 2;  // with fewer rows a kernel before has shrunk
    __shared__ float partial[SHARED ? 2 : 1][RUNS][8 * 20];
    ShrinkShare<HELPERS> share;
    const int2 header = adapted.load(p.lora, p.row_slots, p.rows, thread, 0, 1);
    const int items = header.x * p.eights;
    const bool shares = SHARED && p.exchange.size > 0;
    if (shares) share.begin(p.shrink, header, adapted.found, adapted.rows, thread);
    for (int i = thread; i < 2 * ROWS * C; i += HELPERS) deltas[i] = NO_DELTA;
    adapted.sort(p.lora, header.x, p.eights, thread, 1, 0, 1);
    const float* filled = p.lora.h;
    if (shares) {
        wait_for_previous();
        filled = share.finish(p.shrink, p.exchange, partial, thread);
        if (heavy(p.shrink)) arrive_at(SHARED_OUT);
    }
    u32* h = (u32*)(deltas + 2 * ROWS * C);
    Item now, ahead;
    u32 b[UNITS][4][MT];
    int gathered = -1, number = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, number++) {
        const int first = tile * TILE, slice = GATED ? 0 : slice_of(p.lora, first);
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
        if (gathered != slice) adapted.gather(p.lora, filled, header.y, h, p.rows, slice, thread);
        if (GATED && gathered < 0) adapted.gather(p.lora, filled, header.y, h + ROWS * (p.lora.h_rank + 4), p.rows, 1, thread);
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
        meet<3>(HELPERS);
        wait_at(FULL + (number & 1));
        auto sum = [&](int token, int column) {
            const uint2 base = products[(((number & 1) * ROWS + token) * C + column) / 4];
            const float4 d = *(const float4*)(deltas + ((number & 1) * ROWS + token) * C + column);
            const float scale = adapted.scales[token];
            return make_float4(fmaf(d.x, scale, widen(base.x, 0)), fmaf(d.y, scale, widen(base.x, 1)),
                               fmaf(d.z, scale, widen(base.y, 0)), fmaf(d.w, scale, widen(base.y, 1)));
        };
        for (int cell = thread * 4; cell < p.rows * TILE; cell += HELPERS * 4) {
            const int token = cell / TILE, column = cell % TILE;
            float4 value = sum(token, column);
            if (GATED) value = gated(value, sum(token, 16 + column));
            write_four(p, token, tile * TILE + column, value);
        }
        if (tile + 2 * (int)gridDim.x < tiles) arrive_at(EMPTIED + (number & 1));
    }
}
