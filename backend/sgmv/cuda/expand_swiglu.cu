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
            for (int at = threadIdx.x * 8; at < width; at += 128 * 8)
                *(uint4*)(p.activated + row * p.activated_stride + at) = swiglu(load_row(gate + at), load_row(gate + p.begin[1] + at));
        }
    }
}

struct Activated {  // this lane's tokens, as in Target
    u16* row[2][2];

    __device__ __forceinline__ void aim(const Expand& p, const int4& tile, int mine, int q) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int token = mine + (n >> 1) * 8 + 2 * q + (n & 1);
            row[n >> 1][n & 1] = p.activated + p.rows[tile.y + min(token, tile.z - 1)] * p.activated_stride;
        }
    }
};

// What one slice adds: gate is kept, up writes; the latter also where y was in the stage (zeros past `end`, as all of it is there).
static __device__ __forceinline__ void add_slice(int slice, const Target<2>& target, const Activated& to, uint4 (&gate)[2][2][2],
                                                 const float (&c)[8][2][4], float scale, int at, int end, u16* stage, int row, int chunk) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const int j = n >> 2, i = n >> 1 & 1, half = n & 1;
        uint4 sum = target.sum(c, scale, j, i, half);
        if (slice == 0) {
            gate[j][i][half] = sum;
            continue;
        }
        sum = swiglu(gate[j][i][half], sum);
        if (target.live[j][i] && at + half * 64 < end) *(uint4*)(to.row[j][i] + at + half * 64) = sum;
        *(uint4*)(stage + staged(row + j * 8 + i, chunk + half * 8)) = sum;
    }
}

// Adds a run of `activated`, which a warp has left in its 16 rows of the stage, times the 16 rows of the next linear's A there.
static __device__ __forceinline__ void shrink_stage(float (&sum)[2][4], const u16* stage, int mine, int g, int q) {
    uint4 a0[4], a1[4], x[2][4];
#pragma unroll
    for (int s = 0; s < 4; s++) {
        const u16* a = stage + (LONG_ROWS + 16) * 128 + staged(g, 4 * s + q);
        a0[s] = *(const uint4*)a, a1[s] = *(const uint4*)(a + 8 * 128);
#pragma unroll
        for (int j = 0; j < 2; j++) x[j][s] = *(const uint4*)(stage + (mine + j * 8) * 128 + staged(g, 4 * s + q));
    }
    float acc[2][4];
    one_run<2>(acc, a0, a1, x);
#pragma unroll
    for (int n = 0; n < 8; n++) sum[n >> 2][n & 3] += acc[n >> 2][n & 3];
}

// Writes the sums of a piece and begins the next.
static __device__ __forceinline__ void end_piece(float (&sum)[2][4], const Expand& p, const int4& tile, int piece, int mine, int g, int q) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const int token = mine + (n >> 2) * 8 + 2 * q + (n & 1), r = g + (n >> 1 & 1) * 8;
        if (token < tile.z && r < tile.w) p.ahead[((long long)piece * p.h_rows + tile.y + token) * p.h_rank + r] = sum[n >> 2][n & 3];
        sum[n >> 2][n & 3] = 0.f;
    }
}

// As expand_long for two slices of equal width, gate and up, taken together: `activated` = silu(gate) * up of all rows. gate
// and up themselves stay in registers, where y would be written and read again. With `ahead`, whole pieces are walked and shrunk.
static __device__ __forceinline__ void run_expand_long_swiglu(const Expand& p) {
    extern __shared__ __align__(16) u16 memory[];  // as in expand_long, fragments of gate and of up
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, mine = warp * 16;
    const int rows = stage_rows(p), each = (p.h_rank / 16) * 2 * 32, tiles = p.header[0];
    uint4* h = (uint4*)(memory + p.stages * rows * 128) + warp * 2 * each;
    LongCopies<true> copies;
    int used = 0;
    for (ExpandItem now = copies.begin(p, memory, tiles); now.valid; now.move(p, tiles, gridDim.x, p.groups)) {
        const int4 tile = now.tile;
        const int first = now.group * p.long_run * 128, end = min(p.width[0], first + p.long_run * 128);
        Target<2> target;
        target.aim(p, tile, 0, mine, q);
        Activated to;
        to.aim(p, tile, mine, q);
        const float scale = p.scaling[tile.x];
        __syncwarp();
        gather_h<2>(p, (u32*)h, tile, 0, mine, 16, lane, 32);
        gather_h<2>(p, (u32*)(h + each), tile, 1, mine, 16, lane, 32);
        __syncwarp();
        uint4 gate[2][2][2];
        float sum[2][4];
#pragma unroll
        for (int n = 0; n < 8; n++) sum[n >> 2][n & 3] = 0.f;
        for (int column = first; column < end; column += 128)
#pragma unroll
            for (int slice = 0; slice < 2; slice++) {
                wait_for_copies_but(p.stages - 2);
                __syncthreads();
                copies.fetch(p, tiles);
                u16* stage = memory + used * rows * 128;
                used = used + 1 == p.stages ? 0 : used + 1;
                float c[8][2][4];
                multiply_stage(c, target, stage, h + slice * each, tile.w, mine, lane);
                add_slice(slice, target, to, gate, c, scale, column + g * 8, end, stage, mine + 2 * q, g);
                if (slice == 0 || !p.ahead) continue;
                __syncwarp();
                shrink_stage(sum, stage, mine, g, q);
                if ((column + 128) % PIECE == 0 || column + 128 >= end) end_piece(sum, p, tile, column / PIECE, mine, g, q);
            }
    }
    swiglu_of_base(p);
}

KERNEL(expand_long_swiglu, 128, 2, Expand, run_expand_long_swiglu)
