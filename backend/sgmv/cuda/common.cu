// SGMV on NVIDIA GPUs (sm_80 and later): rows grouped by adapter slot, shrink (in -> rank), expand (rank -> out).
//
// Weights are the 16-row operand of mma.m16n8k16 and tokens its 8 columns, so that every fragment is loaded straight
// from device memory with 16-byte loads and no shared memory, and one to eight tokens cost one instruction.
//
// One order of summation whatever the batch (I9): a row's dot product over `in` is cut into runs of 128 (each 8 mma
// from zero), runs are added in order inside pieces of 1024, pieces are added in order; the rank is walked upwards in
// blocks of 16. Tile shapes and grids change which thread does a sum, never its order. No atomics touch a result.
//
// Every kernel lets its successor start at once and touches x, h and y only after griddepcontrol.wait, which returns
// when the kernel before has completed (as that one waited for the one before it, all of them have). Weights never
// change within a step, and the first kernel after the segment map is launched without this overlap, so both may be
// read before the wait. A shrink whose successor is an expand lets it start only when the base product has completed:
// that successor reads y before the wait as well.

typedef unsigned int u32;
typedef unsigned short u16;

#define RUN 128
#define RUNS 8
#define PIECE (RUN * RUNS)

#ifdef FP16
#define KIND "f16"
#else
#define KIND "bf16"
#endif

static __device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// `v`, which the compiler computes neither later than here nor, in a loop, once for all rounds.
static __device__ __forceinline__ long long computed_here(long long v) {
    asm volatile("" : "+l"(v));
    return v;
}

static __device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <int ID>
static __device__ __forceinline__ void meet(int threads) {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "r"(threads) : "memory");
}

static __device__ __forceinline__ void meet_at(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

static __device__ __forceinline__ uint4 load_weight(const u16* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

static __device__ __forceinline__ uint4 load_row(const u16* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

static __device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Of sixteen rows of sixteen columns, each lane the address of eight columns: mma's operand whose rows are the columns.
static __device__ __forceinline__ uint4 load_transposed(const u16* eight) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"((u32)__cvta_generic_to_shared(eight)) : "memory");
    return v;
}

static __device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn." KIND "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

static __device__ __forceinline__ float widen(u32 pair, int high) {
#ifdef FP16
    float f;
    u16 h = high ? (u16)(pair >> 16) : (u16)pair;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
#else
    return __uint_as_float(high ? (pair & 0xffff0000u) : (pair << 16));
#endif
}

static __device__ __forceinline__ u32 word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

static __device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {  // 16 bytes, or zeros
    const u32 address = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0));
}

static __device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

template <int LEFT>
static __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT));
}

static __device__ __forceinline__ void wait_for_copies_but(int left) {  // at most 6
    switch (left) {
        case 0: return wait_for_copies<0>();
        case 1: return wait_for_copies<1>();
        case 2: return wait_for_copies<2>();
        case 3: return wait_for_copies<3>();
        case 4: return wait_for_copies<4>();
        case 5: return wait_for_copies<5>();
        default: return wait_for_copies<6>();
    }
}

// Where 16 bytes of a row of 128 elements lie in shared memory, `chunk` counted from the row's first: so that eight lanes meet no bank
// twice, whether they read four chunks of two rows one after the other or two of every second of eight rows.
static __device__ __forceinline__ int staged(int row, int chunk) { return row * 128 + (chunk ^ (row & 1) << 2 ^ (row >> 1 & 3) << 1) * 8; }

// One run: 16 rows of A against 8 * NT rows of x; 4 steps of 32 k, two mma each, from zero.
template <int NT>
static __device__ __forceinline__ void one_run(float (&acc)[NT][4], const uint4 (&a0)[4], const uint4 (&a1)[4],
                                               const uint4 (&x)[NT][4]) {
#pragma unroll
    for (int j = 0; j < NT; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) acc[j][i] = 0.f;
#pragma unroll
        for (int s = 0; s < 4; s++) {
            mma(acc[j], a0[s].x, a1[s].x, a0[s].y, a1[s].y, x[j][s].x, x[j][s].y);
            mma(acc[j], a0[s].z, a1[s].z, a0[s].w, a1[s].w, x[j][s].z, x[j][s].w);
        }
    }
}

#define KERNEL(NAME, THREADS, BLOCKS, ARGS, BODY) \
    extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void NAME(const __grid_constant__ ARGS p) { BODY(p); }
#define COMMA ,
