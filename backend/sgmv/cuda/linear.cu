// Where 16-byte chunk `chunk` of a 128-byte row lies in shared memory: odd rows keep their halves swapped, so that
// eight lanes reading 16 bytes each from two rows meet no bank twice.
static __device__ __forceinline__ int swizzled(int row, int chunk) { return row * 64 + (chunk ^ (row & 1) * 4) * 8; }

struct Linear {
    const u16* x;
    const u16* w;  // [out][in]
    u16* y;
    long long x_stride, y_stride;
    int rows, in_features, out_features;
};

// The base product of at most 8 * NT rows, bound by reading w once: a block is 16 * MT rows of w, its 8 warps take
// 64 columns in turn, streamed with x through rings of their own. The first of w do not wait for x.
template <int MT, int NT, int DEPTH>
static __device__ __forceinline__ void linear(const Linear& p) {
    constexpr int STAGE = (16 * MT + 8 * NT) * 64, STRIDE = 16 * MT + 4;
    extern __shared__ __align__(16) u16 memory[];  // [8 warps][DEPTH][w: 16 * MT, x: 8 * NT][64], then float sums
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    u16* ring = memory + warp * DEPTH * STAGE;
    float* sums = (float*)(memory + 8 * DEPTH * STAGE);  // [8 warps][8 * NT][STRIDE]
    const int tiles = (p.out_features + 16 * MT - 1) / (16 * MT), steps = (p.in_features + 63) / 64;
    const int spot = swizzled(lane >> 3, lane & 7);
    let_next_start();
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
            const int k = w_next.step * 64 + (lane & 7) * 8, row = w_next.tile * 16 * MT + (lane >> 3);
            const u16* from = p.w + (long long)row * p.in_features + k;
#pragma unroll
            for (int i = 0; i < 4 * MT; i++)
                copy_async(ring + w_next.slot * STAGE + spot + i * 256, from + 4ll * i * p.in_features,
                           k < p.in_features && row + 4 * i < p.out_features);
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
    int used = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
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
        __syncthreads();
        float* mine = sums + warp * 8 * NT * STRIDE;
#pragma unroll
        for (int i = 0; i < MT * NT * 4; i++)
            mine[(i / 4 % NT * 8 + 2 * q + (i & 1)) * STRIDE + i / (NT * 4) * 16 + g + (i >> 1 & 1) * 8] =
                c[i / (NT * 4)][i / 4 % NT][i & 3];
        __syncthreads();
        for (int cell = threadIdx.x; cell < p.rows * 16 * MT; cell += 256) {
            const int token = cell / (16 * MT), column = cell % (16 * MT), n = tile * 16 * MT + column;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < 8; w++) sum += sums[(w * 8 * NT + token) * STRIDE + column];
            if (n < p.out_features) p.y[token * p.y_stride + n] = (u16)pack(sum, 0.f);
        }
    }
}

KERNEL(linear_8, 256, 1, Linear, linear<1 COMMA 1 COMMA 5>)
KERNEL(linear_16, 256, 1, Linear, linear<1 COMMA 2 COMMA 4>)
KERNEL(linear_32, 256, 1, Linear, linear<2 COMMA 4 COMMA 2>)
