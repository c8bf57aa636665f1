// The operations of `_silu_mul` in ops_triton.py, one by one, so that a row has the same bits by either way.
static __device__ __forceinline__ float swiglu(float gate, float up) {
    float e, sigmoid;
    asm("ex2.approx.f32 %0, %1;" : "=f"(e) : "f"(-gate * 1.4426950408889634f));
    asm("div.full.f32 %0, %1, %2;" : "=f"(sigmoid) : "f"(1.f), "f"(1.f + e));
    return gate * sigmoid * up;
}

static __device__ __forceinline__ uint4 swiglu(const uint4& gate, const uint4& up) {
    u32 out[4];
#pragma unroll
    for (int m = 0; m < 4; m++) {
        const u32 a = word(gate, m), b = word(up, m);
        out[m] = pack(swiglu(widen(a, 0), widen(b, 0)), swiglu(widen(a, 1), widen(b, 1)));
    }
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

// What one slice adds: gate is kept, up writes.
static __device__ __forceinline__ void add_slice(int slice, const Target<2>& target, const Activated& to, uint4 (&gate)[2][2][2],
                                                 const float (&c)[8][2][4], float scale, int at, int end) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const int j = n >> 2, i = n >> 1 & 1, half = n & 1;
        const uint4 sum = target.sum(c, scale, j, i, half);
        if (slice == 0)
            gate[j][i][half] = sum;
        else if (target.live[j][i] && at + half * 64 < end)
            *(uint4*)(to.row[j][i] + at + half * 64) = swiglu(gate[j][i][half], sum);
    }
}

// As expand_long for two slices of equal width, gate and up, taken together: `activated` = silu(gate) * up of all rows. gate
// and up themselves stay in registers, where y would be written and read again.
static __device__ __forceinline__ void run_expand_long_swiglu(const Expand& p) {
    extern __shared__ __align__(16) u16 memory[];  // B: [2][h_rank][B_ROW], then fragments of gate and of up
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, mine = warp * 16;
    const int each = (p.h_rank / 16) * 2 * 32;
    uint4* h = (uint4*)(memory + 2 * p.h_rank * B_ROW) + warp * 2 * each;
    const int tiles = p.header[0], width = p.width[0], shift = p.begin[1] - p.begin[0];
    let_next_start();
    bool waited = false;
    ExpandItem now;
    now.flat = now.number = 0;
    for (now.move(p, tiles, blockIdx.x, p.groups); now.valid; now.move(p, tiles, gridDim.x, p.groups)) {
        const int4 tile = now.tile;
        const int columns = p.long_run * 128, first = now.group * columns, end = min(width, first + columns);
        auto fetch = [&](int column, int slice) {
            const u16* b = p.weights + tile.x * p.slot_stride + tile.w * p.b_unit[slice];
            copy_b(memory + slice * p.h_rank * B_ROW, b, tile.w, width, column, end);
        };
        fetch(first, 0);
        Target<2> target;
        target.aim(p, tile, 0, mine, q);
        Activated to;
        to.aim(p, tile, mine, q);
        const float scale = p.scaling[tile.x];
        target.load(first + g * 8, end);
        if (!waited) {
            wait_for_previous();
            waited = true;
        }
        gather_h<2>(p, (u32*)h, tile, 0, mine, 16, lane, 32);
        gather_h<2>(p, (u32*)(h + each), tile, 1, mine, 16, lane, 32);
        __syncwarp();
        uint4 gate[2][2][2];
        for (int column = first; column < end; column += 128)
#pragma unroll
            for (int slice = 0; slice < 2; slice++) {
                Target<2> next = target;
                if (slice)
                    next.load(column + 128 + g * 8, end);
                else
                    next.load(column + shift + g * 8, end + shift);
                wait_for_copies<0>();
                __syncthreads();
                fetch(slice ? column + 128 : column, slice ^ 1);
                float c[8][2][4];
                clear<2>(c);
                for (int block = 0; block * 16 < tile.w; block++) {
                    uint4 v[8];
                    read_b(v, memory + (slice * p.h_rank + block * 16) * B_ROW, g, q);
                    multiply<2>(c, v, h + slice * each + block * 2 * 32, lane);
                }
                add_slice(slice, target, to, gate, c, scale, column + g * 8, end);
                target = next;
            }
        __syncthreads();
    }
    if (!waited) wait_for_previous();
    swiglu_of_base(p);
}

KERNEL(expand_long_swiglu, 128, 2, Expand, run_expand_long_swiglu)
