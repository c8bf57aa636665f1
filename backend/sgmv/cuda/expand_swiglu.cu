static __device__ __forceinline__ float exp2_of(float x) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x));
    return e;
}

static __device__ __forceinline__ float inverse(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// The operations of `_silu_mul` in ops_triton.py, one by one, so that a row has the same bits by either way. That 2^x is taken
// for 0 where it is no normal number changes no 1 + 2^x; and a quarter of that has no quotient too small for the instruction.
static __device__ __forceinline__ float swiglu(float gate, float up) {
    const float quarter = fmaf(exp2_of(-gate * 1.4426950408889634f), 0.25f, 0.25f);
    return gate * (inverse(quarter) * 0.25f) * up;
}

static __device__ __forceinline__ uint4 swiglu(const uint4& gate, const uint4& up) {
    u32 out[4];
#pragma unroll
    for (int m = 0; m < 4; m++)
        out[m] = pack(swiglu(widen(word(gate, m), 0), widen(word(up, m), 0)), swiglu(widen(word(gate, m), 1), widen(word(up, m), 1)));
    return make_uint4(out[0], out[1], out[2], out[3]);
}

// Of the rows without an adapter, which no tile has: a block takes every gridDim.x-th.
static __device__ __forceinline__ void swiglu_of_base(const Expand& p) {
    const int lane = threadIdx.x & 31, width = p.width[0];
    for (int start = blockIdx.x; start < p.h_rows; start += 32 * gridDim.x) {
        const int mine = start + lane * gridDim.x, slot = mine < p.h_rows ? p.row_slots[mine] : 0;
        for (int i = 0; i < 32; i++) {
            if (__shfl_sync(~0u, slot, i) >= 0) continue;
            const long long row = start + i * gridDim.x;
            const u16* gate = p.y + row * p.y_stride;
#pragma unroll 4
            for (int at = threadIdx.x * 8; at < width; at += 256 * 8)
                *(uint4*)(p.activated + row * p.activated_stride + at) = swiglu(load_row(gate + at), load_row(gate + p.begin[1] + at));
        }
    }
}

// What one slice adds: gate is kept, up writes; the latter also where y was in the stage (zeros past the end, as all of it is there).
static __device__ __forceinline__ void add_slice(int slice, const LongTarget& to, uint4 (&gate)[2][2], const float (&c)[4][2][4], float scale,
                                                 int at, bool inside, u16* stage, const LongWarp& warp) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const int j = n >> 1, i = n & 1;
        uint4 sum = long_sum(c, scale, stage, j, i, warp);
        if (slice == 0) {
            gate[j][i] = sum;
            continue;
        }
        sum = swiglu(gate[j][i], sum);
        to.store(sum, j, i, at, inside);
        *(uint4*)(stage + staged(warp.mine + j * 8 + 2 * warp.q + i, warp.half * 8 + warp.g)) = sum;
    }
}

// Adds a run of `activated`, which two warps have left in their 16 rows of the stage, times the 16 rows of the next linear's A there:
// eight of the rows each.
static __device__ __forceinline__ void shrink_stage(float (&sum)[4], const u16* stage, const LongWarp& warp) {
    uint4 a0[4], a1[4], x[1][4];
#pragma unroll
    for (int s = 0; s < 4; s++) {
        const u16* a = stage + (LONG_ROWS + 16) * 128 + staged(warp.g, 4 * s + warp.q);
        a0[s] = *(const uint4*)a, a1[s] = *(const uint4*)(a + 8 * 128);
        x[0][s] = *(const uint4*)(stage + (warp.mine + warp.half * 8) * 128 + staged(warp.g, 4 * s + warp.q));
    }
    float acc[1][4];
    one_run<1>(acc, a0, a1, x);
#pragma unroll
    for (int n = 0; n < 4; n++) sum[n] += acc[0][n];
}

// Writes the sums of a piece and begins the next.
static __device__ __forceinline__ void end_piece(float (&sum)[4], const Expand& p, const int4& tile, int piece, const LongWarp& warp) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const int token = warp.mine + warp.half * 8 + 2 * warp.q + (n & 1), r = warp.g + (n >> 1) * 8;
        if (token < tile.z && r < tile.w) p.ahead[((long long)piece * p.h_rows + tile.y + token) * p.h_rank + r] = sum[n];
        sum[n] = 0.f;
    }
}

// As expand_long for two slices of equal width, gate and up, taken together: `activated` = silu(gate) * up of all rows. gate
// and up themselves stay in registers, where y would be written and read again. With `ahead`, whole pieces are walked and shrunk.
static __device__ __forceinline__ void run_expand_long_swiglu(const Expand& p) {
    extern __shared__ __align__(16) u16 memory[];  // as in expand_long, fragments of gate and of up
    const LongWarp warp;
    const int stage_size = stage_rows(p) * 128, each = (p.h_rank / 16) * 2 * 32;
    uint4* h = (uint4*)(memory + p.stages * stage_size) + warp.mine / 16 * 2 * each;
    LongCopies<true> copies;
    int used = 0;
    for (LongItem now = copies.begin(p, memory); now.valid; now.move(p)) {
        const int4 tile = now.tile;
        LongTarget to;
        to.aim(p, tile, p.activated, p.activated_stride, warp);
        const float scale = p.scaling[tile.x];
        warp.meet_other();
        gather_h<2>(p, (u32*)(h + warp.half * each), tile, warp.half, warp.mine, 16, warp.lane, 32);
        warp.meet_other();
        uint4 gate[2][2];
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        for (int column = now.first; column < now.last; column += 128) {
            const bool inside = column + warp.half * 64 + warp.g * 8 < now.last;
#pragma unroll
            for (int slice = 0; slice < 2; slice++) {
                wait_for_copies_but(p.stages - 2);
                __syncthreads();
                copies.fetch(p);
                u16* stage = memory + used * stage_size;
                used = used + 1 == p.stages ? 0 : used + 1;
                float c[4][2][4];
                multiply_stage(c, stage, h + slice * each, tile.w, warp);
                add_slice(slice, to, gate, c, scale, column, inside, stage, warp);
                if (slice == 0 || !p.ahead) continue;
                warp.meet_other();
                shrink_stage(sum, stage, warp);
                if ((column + 128) % PIECE == 0 || column + 128 >= now.last) end_piece(sum, p, tile, column / PIECE, warp);
            }
        }
    }
    swiglu_of_base(p);
}

KERNEL(expand_long_swiglu, 256, 2, Expand, run_expand_long_swiglu)
