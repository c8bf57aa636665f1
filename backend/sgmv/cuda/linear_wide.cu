#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct LinearWide {
    TensorMap w, x;  // [out][in] and [rows][in], in boxes of 64 columns (cuTensorMapEncodeTiled, 128-byte swizzle)
    u16* y;
    const int* row_slots;  // null: no row has an adapter
    long long y_stride;
    int rows, in_features, out_features, eights;  // eights: rows of a tile of `lora`, by eight
    int depth, stage_bytes;                       // of the ring
    Expand lora;
    Shrink shrink;
    Exchange exchange;
};

// The sums of the cluster's blocks for four columns of a row, in the order of their ranks.
static __device__ __forceinline__ float4 total(const float* sums, int size) {
    const u32 at = shared_address(sums);
    float4 sum = load_from(at, 0);
    for (int block = 1; block < size; block++) {
        const float4 v = load_from(at, block);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    return sum;
}

struct Ring {  // a place in the ring of boxes, and how often it was gone round
    int slot = 0, round = 0;

    __device__ __forceinline__ void move(int depth) {
        if (++slot == depth) slot = 0, round++;
    }
};

#define RING_MOST 24

// The base product of at most N rows, and what LoRA adds to it. A block takes 64 * GROUPS rows of w at a time; the blocks of a
// cluster split the columns among them and add their sums up in the order of their ranks. One warp fetches w and x by the copy
// engine into a ring of boxes; GROUPS warpgroups multiply; meanwhile others do a share of the shrink, unless it comes before,
// and compute B h of the adapted rows, which is then added to the rounded sums: the bits are those of the base product alone and
// `expand` after it.
// As in `linear`, the first of w do not wait for x.
template <int N, int GROUPS>
struct Wide {
    static constexpr int HELPERS = GROUPS > 1 ? 128 : 256;  // more would leave too few registers
    static constexpr int M = 64 * GROUPS, STAGE = (M + N) * 64, STRIDE = M + 4, SHARERS = 128 * GROUPS;
    const LinearWide& p;
    u16* boxes;  // [depth][w: M, x: N][64]
    u64 *full, *empty, *shared_out;
    float *sums, *deltas;  // [N][STRIDE]; the same place unless blocks share a tile
    u32* h;
    Adapted<N, HELPERS>& adapted;
    int rank, size, tiles, first, count;

    __device__ __forceinline__ void fetch() const {
        Ring w_at, x_at;
        auto fetch_w = [&](int tile, int i) {
            barrier_expect(full + w_at.slot, p.stage_bytes);
            copy_box(boxes + w_at.slot * STAGE, p.w, (first + i) * 64, tile * M, full + w_at.slot);
            w_at.move(p.depth);
        };
        auto fetch_x = [&](int i) {
            copy_box(boxes + x_at.slot * STAGE + M * 64, p.x, (first + i) * 64, 0, full + x_at.slot);
            x_at.move(p.depth);
        };
        const int early = min(p.depth, count);
        for (int tile = blockIdx.x / size; tile < tiles; tile += gridDim.x / size) {
            int i = 0;
            if (w_at.slot + w_at.round == 0) {
                for (; i < early; i++) fetch_w(tile, i);
                wait_for_previous();
                for (i = 0; i < early; i++) fetch_x(i);
                if (p.row_slots && p.exchange.size > 0 && heavy(p.shrink)) barrier_wait(shared_out, 0);
            }
            for (; i < count; i++) {
                if (w_at.round > 0) barrier_wait(empty + w_at.slot, (w_at.round - 1) & 1);
                fetch_w(tile, i);
                fetch_x(i);
            }
        }
    }

    __device__ __forceinline__ void add_lora(int thread) const {
        constexpr int WARPS = HELPERS / 32;
        const int warp = thread >> 5, lane = thread & 31, g = lane >> 2, q = lane & 3;
        const int stride = gridDim.x / size, by = WARPS * size, start = rank * WARPS + warp;
        __shared__ float partial[2][RUNS][8 * 20];
        ShrinkShare<HELPERS> share;
        const int2 header = adapted.load(p.lora, p.row_slots, p.rows, thread, rank, size);
        const bool shares = p.exchange.size > 0;
        if (shares) share.begin(p.shrink, header, adapted.found, adapted.rows, thread);
        adapted.sort(p.lora, header.x, p.eights, thread, WARPS, rank, size);
        const float* filled = p.lora.h;
        if (shares) {
            wait_for_previous();
            filled = share.finish(p.shrink, p.exchange, partial, thread);
            if (thread == 0) barrier_arrive(shared_out);
        }
        const int items = header.x * p.eights;
        int slice = 0, column = 0, gathered = -1;
        Item now{}, ahead{};
        uint4 b[8];
        auto fetch = [&]() {
            if (!ahead.valid) return;
            const int r0 = ahead.block * 16 + 2 * q, width = p.lora.width[slice];
            const u16* from = p.lora.weights + ahead.tile.x * p.lora.slot_stride + ahead.tile.w * p.lora.b_unit[slice] +
                              (long long)r0 * width + column;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = (i & 1) + (i >> 1) * 8;
                const bool inside = r0 + r < ahead.tile.w;
                b[i] = inside ? load_weight(from + (long long)r * width) : make_uint4(0, 0, 0, 0);
                b[i + 4] = inside && GROUPS > 1 ? load_weight(from + (long long)r * width + 64) : make_uint4(0, 0, 0, 0);
            }
            if (++ahead.block * 16 >= ahead.tile.w) ahead.seek(adapted.tiles, items, p.eights, ahead.index + by, by);
        };
        auto begin = [&](int number) {  // the first of a tile's B are on their way while the tile before is finished
            if (number >= tiles) return;
            slice = slice_of(p.lora, number * M), column = number * M - p.lora.begin[slice] + g * 8;
            now.seek(adapted.tiles, items, p.eights, start, by);
            ahead = now;
            fetch();
        };
        begin(blockIdx.x / size);
        wait_for_previous();
        for (int number = blockIdx.x / size; number < tiles; number += stride) {
            for (int i = thread; i < p.rows * (STRIDE / 4); i += HELPERS)
                ((float4*)deltas)[i] = make_float4(NO_DELTA, NO_DELTA, NO_DELTA, NO_DELTA);
            meet<3>(HELPERS);
            if (gathered != slice) adapted.template gather<true>(p.lora, filled, header.y, h, p.rows, slice, thread);
            gathered = slice;
            while (now.valid) {
                float d[8][1][4];
                clear<1>(d);
                for (; now.block * 16 < now.tile.w; now.block++) {
                    const uint4 f[1] = {now.fragment(h, p.lora.h_rank, g, q)};
                    multiply<1>(d, b, f);
                    fetch();
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int token = now.first + 2 * q + i;
                    if (token >= now.tile.z) continue;
                    const int row = adapted.rows[now.tile.y + token];
#pragma unroll
                    for (int half = 0; half < GROUPS; half++) {
                        float4* to = (float4*)(deltas + row * STRIDE + half * 64 + g * 8);
                        const int k = half * 2 + i;
                        to[0] = make_float4(d[0][0][k], d[1][0][k], d[2][0][k], d[3][0][k]);
                        to[1] = make_float4(d[4][0][k], d[5][0][k], d[6][0][k], d[7][0][k]);
                    }
                }
                now.seek(adapted.tiles, items, p.eights, now.index + by, by);
            }
            meet<4>(SHARERS + HELPERS);
            begin(number + stride);
            if (size == 1) meet<2>(SHARERS + HELPERS);  // of a cluster's blocks each has one tile
        }
    }

    __device__ __forceinline__ void multiply_boxes(float (&c)[N / 2], Ring& at, int warp, int lane) const {
#pragma unroll
        for (int i = 0; i < N / 2; i++) c[i] = 0.f;
        const u16* my_boxes = boxes + (warp >> 2) * 64 * 64;
        int before = -1;
        for (int i = 0; i < count; i++) {
            barrier_wait(full + at.slot, at.round & 1);
            const u64 w = box_descriptor(my_boxes + at.slot * STAGE), x = box_descriptor(boxes + at.slot * STAGE + M * 64);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int k = 0; k < 4; k++) wgmma(c, w + 2 * k, x + 2 * k);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            wgmma_wait<1>();
            if (before >= 0 && lane == 0) barrier_arrive(empty + before);
            before = at.slot;
            at.move(p.depth);
        }
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(empty + before);
    }

    __device__ __forceinline__ void finish(int thread, int origin) const {
        constexpr int EACH = M / 8;  // threads a row takes
        const int column = thread % EACH * 8;
        if (origin + column >= p.out_features) return;
        for (int row = thread / EACH; row < p.rows; row += SHARERS / EACH) {
            if (p.row_slots ? !adapted.mine[row] : row % size != rank) continue;
            const int at = row * STRIDE + column;
            float4 low = total(sums + at, size), high = total(sums + at + 4, size);
            if (size > 1 && p.row_slots) {
                const float4 a = *(const float4*)(deltas + at), b = *(const float4*)(deltas + at + 4);
                const float scale = adapted.scales[row];
                low = make_float4(plus(low.x, a.x, scale), plus(low.y, a.y, scale), plus(low.z, a.z, scale), plus(low.w, a.w, scale));
                high = make_float4(plus(high.x, b.x, scale), plus(high.y, b.y, scale), plus(high.z, b.z, scale), plus(high.w, b.w, scale));
            }
            *(uint4*)(p.y + row * p.y_stride + origin + column) =
                make_uint4(pack(low.x, low.y), pack(low.z, low.w), pack(high.x, high.y), pack(high.z, high.w));
        }
    }

    __device__ __forceinline__ void multiply_and_finish(int thread) const {
        const int warp = thread >> 5, lane = thread & 31, g = lane >> 2, q = lane & 3, stride = gridDim.x / size;
        Ring at;
        for (int number = blockIdx.x / size; number < tiles; number += stride) {
            float c[N / 2];
            multiply_boxes(c, at, warp, lane);
            meet<4>(p.row_slots ? SHARERS + HELPERS : SHARERS);
#pragma unroll
            for (int i = 0; i < N / 2; i++) {
                const int row = i / 4 * 8 + 2 * q + (i & 1);
                float& sum = sums[row * STRIDE + warp * 16 + g + (i >> 1 & 1) * 8];
                sum = size > 1 || !p.row_slots ? c[i] : plus(c[i], sum, adapted.scales[row]);
            }
            if (size > 1)
                cluster_sync();
            else
                meet<1>(SHARERS);
            finish(thread, number * M);
            if (size == 1) meet<2>(p.row_slots ? SHARERS + HELPERS : SHARERS);
        }
        if (size > 1) cluster_sync();
    }
};

template <int N, int GROUPS>
static __device__ __forceinline__ void linear_wide(const LinearWide& p) {
    using Block = Wide<N, GROUPS>;
    extern __shared__ __align__(1024) u16 boxes[];
    __shared__ u64 full[RING_MOST], empty[RING_MOST], shared_out;
    __shared__ Adapted<N, Block::HELPERS> adapted;
    const int rank = cluster_rank(), size = cluster_size(), steps = (p.in_features + 63) / 64;
    const int first = steps * rank / size, count = steps * (rank + 1) / size - first;
    let_next_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.depth; i++) barrier_init(full + i, 1), barrier_init(empty + i, 4 * GROUPS);
        barrier_init(&shared_out, 1);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    float* sums = (float*)(boxes + p.depth * Block::STAGE);
    float* deltas = size > 1 ? sums + N * Block::STRIDE : sums;
    Block block{p,    boxes, full, empty, &shared_out, sums, deltas, (u32*)(deltas + N * Block::STRIDE), adapted,
                rank, size,  (p.out_features + Block::M - 1) / Block::M, first, count};
    const int thread = threadIdx.x;
    if (thread < Block::SHARERS) {
        block.multiply_and_finish(thread);
        return;
    }
    if (thread == Block::SHARERS + Block::HELPERS)
        block.fetch();
    else if (thread < Block::SHARERS + Block::HELPERS && p.row_slots)
        block.add_lora(thread - Block::SHARERS);
    __syncwarp();
    if (size > 1) {
        cluster_sync();
        cluster_sync();
    }
}

#define WIDE_KERNEL(N, GROUPS) \
    KERNEL(linear_wide_##N##_##GROUPS, 416, 1, LinearWide, linear_wide<N COMMA GROUPS>)
WIDE_KERNEL(64, 1)
WIDE_KERNEL(64, 2)
WIDE_KERNEL(128, 1)
WIDE_KERNEL(128, 2)

#endif
