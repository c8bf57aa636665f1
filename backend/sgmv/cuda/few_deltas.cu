// What LoRA adds to the base product of few rows, in `linear.cu`, by warps of their own.

struct Linear {
    const u16* x;
    const u16* w;  // [out][in]
    u16* y;
    const int* row_slots;  // null: no row has an adapter
    long long x_stride, y_stride;
    int rows, in_features, out_features;
    int eights, ring;  // rows of a tile of `lora`, by eight; places of a ring of `few_deltas`
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

// Where chunk `chunk` of eight columns of a rank lies among sixteen ranks of C columns of B: so that eight ranks of one chunk meet no
// bank twice.
template <int C>
static __device__ __forceinline__ int placed(int rank, int chunk) {
    return rank * C + (chunk ^ (C == 32 ? rank >> 1 & 3 : rank >> 2 & 1)) * 8;
}

// A share of the shrink, unless it comes before; then B h for each tile of `linear`, added to the products that it hands over.
// Warps take items in turn; B comes through rings of their own, sixteen ranks of a tile's columns at a time, of each slice half if
// GATED.
template <int MT, int NT, bool GATED>
static __device__ __forceinline__ void few_deltas(const Linear& p, Adapted<8 * NT, FEW_HELPERS>& adapted, float* deltas,
                                                  const uint2* products, int tiles, int thread) {
    constexpr int C = 16 * MT, ROWS = 8 * NT, HELPERS = FEW_HELPERS, WARPS = HELPERS / 32;
    constexpr int TILE = GATED ? 16 : C, CHUNKS = C / 8;
    const int warp = thread >> 5, lane = thread & 31, g = lane >> 2, q = lane & 3;
    constexpr bool SHARED = NT > 2;  // with fewer rows a kernel before has shrunk
    ShrinkShare<HELPERS> share;
    const int2 header = adapted.load(p.lora, p.row_slots, p.rows, thread, 0, 1);
    const int items = header.x * p.eights, h_row = p.lora.h_rank + 4;
    const bool shares = SHARED && p.exchange.size > 0;
    if (shares) share.begin(p.shrink, header, adapted.found, adapted.rows, thread);
    for (int i = thread; i < 2 * ROWS * C; i += HELPERS) deltas[i] = NO_DELTA;
    adapted.sort(p.lora, header.x, p.eights, thread, 1, 0, 1);
    u32* h = (u32*)(deltas + 2 * ROWS * C);
    u16* rings = (u16*)(h + (GATED ? 2 : 1) * ROWS * h_row);
    u16* ring = rings + warp * p.ring * 16 * C;
    Item now, ahead;
    int ahead_tile = blockIdx.x, filled_place = 0, used_place = 0;
    ahead.seek(adapted.tiles, items, p.eights, warp, WARPS);
    auto fetch = [&]() {
        if (ahead.valid && ahead_tile < tiles) {
            const int first = ahead_tile * TILE, slice = GATED ? 0 : slice_of(p.lora, first), width = p.lora.width[slice];
            const int chunk = lane % CHUNKS, column = first - p.lora.begin[slice] + (GATED ? chunk & 1 : chunk) * 8;
            const long long unit = p.lora.b_unit[GATED ? chunk >> 1 : slice];
            const u16* from = p.lora.weights + ahead.tile.x * p.lora.slot_stride + ahead.tile.w * unit + column;
#pragma unroll
            for (int r = lane / CHUNKS; r < 16; r += 32 / CHUNKS)
                copy_async(ring + filled_place * 16 * C + placed<C>(r, chunk), from + (long long)(ahead.block * 16 + r) * width,
                           ahead.block * 16 + r < ahead.tile.w);
            filled_place = filled_place + 1 == p.ring ? 0 : filled_place + 1;
            if (++ahead.block * 16 >= ahead.tile.w) ahead.seek(adapted.tiles, items, p.eights, ahead.index + WARPS, WARPS);
            if (!ahead.valid) ahead_tile += gridDim.x, ahead.seek(adapted.tiles, items, p.eights, warp, WARPS);
        }
        commit_copies();
    };
    for (int i = 0; i < p.ring - 1; i++) fetch();
    wait_for_previous();
    const float* filled = p.lora.h;
    if (shares) {
        filled = share.finish(p.shrink, p.exchange, (float(*)[RUNS][8 * 20])(rings + WARPS * p.ring * 16 * C), thread);
        if (heavy(p.shrink)) arrive_at(SHARED_OUT);
    }
    int gathered = -1, number = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, number++) {
        const int slice = GATED ? 0 : slice_of(p.lora, tile * TILE);
        if (gathered >= 0 && gathered != slice) meet<3>(HELPERS);
        if (gathered != slice) adapted.template gather<SHARED>(p.lora, filled, header.y, h, p.rows, slice, thread);
        if (GATED && gathered < 0) adapted.template gather<SHARED>(p.lora, filled, header.y, h + ROWS * h_row, p.rows, 1, thread);
        gathered = slice;
        float* mine = deltas + (number & 1) * ROWS * C + g;
        float d[MT][4];
        for (now.seek(adapted.tiles, items, p.eights, warp, WARPS); now.valid;) {
            fetch();
            wait_for_copies_but(p.ring - 1);
            __syncwarp();
            const u16* b = ring + used_place * 16 * C;
            used_place = used_place + 1 == p.ring ? 0 : used_place + 1;
#pragma unroll
            for (int m = 0; m < MT; m++) {
                if (now.block == 0) d[m][0] = d[m][1] = d[m][2] = d[m][3] = 0.f;
                const uint4 a = load_transposed(b + placed<C>((lane >> 4) * 8 + (lane & 7), 2 * m + (lane >> 3 & 1)));
                const uint4 f = now.fragment(h + (GATED ? m * ROWS * h_row : 0), p.lora.h_rank, g, q);
                mma(d[m], a.x, a.y, a.z, a.w, f.x, f.y);
                mma(d[m], a.x, a.y, a.z, a.w, f.z, f.w);
            }
            __syncwarp();
            if (++now.block * 16 < now.tile.w) continue;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int token = now.first + 2 * q + i;
                if (token >= now.tile.z) continue;
                float* to = mine + adapted.rows[now.tile.y + token] * C;
#pragma unroll
                for (int m = 0; m < MT; m++) to[m * 16] = d[m][i], to[m * 16 + 8] = d[m][2 + i];
            }
            now.seek(adapted.tiles, items, p.eights, now.index + WARPS, WARPS);
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
