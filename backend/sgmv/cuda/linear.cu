// Where 16-byte chunk `chunk` of a 128-byte row lies in shared memory: odd rows keep their halves swapped, so that
// eight lanes reading 16 bytes each from two rows meet no bank twice.
static __device__ __forceinline__ int swizzled(int row, int chunk) { return row * 64 + (chunk ^ (row & 1) * 4) * 8; }

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
    uint2* products = (uint2*)(sums + 8 * 8 * NT * STRIDE);  // [2][8 * NT][16 * MT], rounded
    float* deltas = (float*)(products + 2 * 8 * NT * 4 * MT);  // [2][8 * NT][16 * MT], for tiles in turn; then h
    __shared__ Adapted<8 * NT, FEW_HELPERS> adapted;
    constexpr int TILE = GATED ? 16 : 16 * MT;  // columns of y
    const int half = p.out_features / 2, steps = (p.in_features + 63) / 64;
    const int tiles = ((GATED ? half : p.out_features) + TILE - 1) / TILE;
    const int spot = swizzled(lane >> 3, lane & 7);
    let_next_start();
    if (warp >= 8) {
        few_deltas<MT, NT, GATED>(p, adapted, deltas, products, tiles, threadIdx.x - 256);
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
    const u16* first_x = (const u16*)computed_here((long long)(p.x + (lane >> 3) * p.x_stride + (lane & 7) * 8));
    auto fetch_x = [&]() {
        if (x_next.tile < tiles) {
            const int k = x_next.step * 64 + (lane & 7) * 8, row = lane >> 3;
            const u16* from = first_x + x_next.step * 64;
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
    if (NT > 2 && p.row_slots && p.exchange.size > 0 && heavy(p.shrink)) wait_at(SHARED_OUT);
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
        meet<2>(256);
        auto product = [&](int token, int column) {
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int w = 0; w < 8; w++) {
                const float4 v = *(const float4*)(sums + (w * 8 * NT + token) * STRIDE + column);
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            return sum;
        };
        if (p.row_slots) {  // the helpers add LoRA's part
            if (number > 1) wait_at(EMPTIED + (number & 1));
            for (int cell = threadIdx.x * 4; cell < p.rows * 16 * MT; cell += 1024) {
                const float4 value = product(cell / (16 * MT), cell % (16 * MT));
                products[((number & 1) * 8 * NT * 16 * MT + cell) / 4] = make_uint2(pack(value.x, value.y), pack(value.z, value.w));
            }
            arrive_at(FULL + (number & 1));
            continue;
        }
        for (int cell = threadIdx.x * 4; cell < p.rows * TILE; cell += 1024) {
            const int token = cell / TILE, column = cell % TILE;
            float4 value = product(token, column);
            if (GATED) value = gated(value, product(token, 16 + column));
            write_four(p, token, tile * TILE + column, value);
        }
    }
}

// Compiled as for 640 threads, 512 at most leave the registers for a block of the norm, which is there when they end; those of 32 rows
// need all of them.
KERNEL(linear_8, 640, 1, Linear, linear<1 COMMA 1 COMMA 5>)
KERNEL(linear_16, 640, 1, Linear, linear<1 COMMA 2 COMMA 4>)
KERNEL(linear_32, 512, 1, Linear, linear<2 COMMA 4 COMMA 2>)
KERNEL(linear_gated_8, 640, 1, Linear, linear<2 COMMA 1 COMMA 3 COMMA true>)
KERNEL(linear_gated_16, 640, 1, Linear, linear<2 COMMA 2 COMMA 3 COMMA true>)
KERNEL(linear_gated_32, 512, 1, Linear, linear<2 COMMA 4 COMMA 2 COMMA true>)
