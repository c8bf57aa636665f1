#define RING 3

// Short segments: a block is one (tile of 8 * NT rows, 512 or 1024 columns); its 4 warps take 128 columns in turn.
// The next 16 ranks x 128 columns of B, whichever item they belong to, are on their way while these are multiplied:
// in registers, or (RINGED, for ranks above 16) in a ring of shared memory.
template <int NT, bool RINGED>
static __device__ __forceinline__ void expand_short(const Expand& p) {
    constexpr int DEPTH = RINGED ? RING : 0;
    extern __shared__ __align__(16) u16 memory[];  // [4 warps][DEPTH][16][B_ROW], then fragments [2][h_rank / 16][NT][32]
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    u16* ring = memory + warp * DEPTH * 16 * B_ROW;
    uint4* fragments = (uint4*)(memory + 4 * DEPTH * 16 * B_ROW);
    const int tiles = p.header[0];
    const int run = tiles * (p.groups[0] + p.groups[1] + p.groups[2]) >= 4 * (int)gridDim.x ? 2 : 1;
    const int groups[3] = {(p.groups[0] + run - 1) / run, (p.groups[1] + run - 1) / run, (p.groups[2] + run - 1) / run};
    let_next_start();
    ExpandItem now, next, ahead;
    now.flat = now.number = 0;
    now.move(p, tiles, blockIdx.x, groups);
    ahead = now;
    int ahead_sub = 0, ahead_block = 0, filled = 0, used = 0;
    uint4 b[8];
    auto fetch = [&]() {
        if (ahead.valid) {
            const int column = (ahead.group * run + ahead_sub) * 512 + warp * 128, width = p.width[ahead.slice];
            if (RINGED) {
                const int r0 = ahead_block * 16 + (lane >> 4), at = column + (lane & 15) * 8;
                const u16* from = ahead.b(p) + (long long)r0 * width + at;
                u16* to = ring + filled * 16 * B_ROW + (lane >> 4) * B_ROW + (lane & 15) * 8;
#pragma unroll
                for (int i = 0; i < 8; i++)
                    copy_async(to + 2 * i * B_ROW, from + 2ll * i * width, r0 + 2 * i < ahead.tile.w && at < width);
                filled = filled + 1 == RING ? 0 : filled + 1;
            } else {
                const int r0 = ahead_block * 16 + 2 * q, at = column + g * 8;
                const u16* from = ahead.b(p) + (long long)r0 * width + at;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int r = (i & 1) + (i >> 1) * 8;
                    const bool inside = r0 + r < ahead.tile.w;
                    b[i] = inside && at < width ? load_weight(from + r * width) : make_uint4(0, 0, 0, 0);
                    b[i + 4] = inside && at + 64 < width ? load_weight(from + r * width + 64) : make_uint4(0, 0, 0, 0);
                }
            }
            ahead_block++;
            if (ahead_block * 16 >= ahead.tile.w) {
                ahead_block = 0;
                if (++ahead_sub == run) ahead_sub = 0, ahead.move(p, tiles, gridDim.x, groups);
            }
        }
        if (RINGED) commit_copies();
    };
#pragma unroll
    for (int i = 0; i < (RINGED ? RING - 1 : 1); i++) fetch();
    Target<NT> target;
    float scale = 0.f;
    auto begin = [&]() {
        if (!now.valid) return;
        target.aim(p, now.tile, now.slice, 0, q);
        target.load(now.group * run * 512 + warp * 128 + g * 8, p.width[now.slice]);
        scale = p.scaling[now.tile.x];
    };
    begin();
    wait_for_previous();
    for (int parity = 0; now.valid; parity ^= 1) {
        const int4 tile = now.tile;
        const int slice = now.slice, width = p.width[slice], first = now.group * run * 512 + warp * 128 + g * 8;
        next = now;
        next.move(p, tiles, gridDim.x, groups);
        uint4* h = fragments + parity * (p.h_rank / 16) * NT * 32;
        gather_h<NT>(p, (u32*)h, tile, slice, 0, 8 * NT, threadIdx.x, 128);
        __syncthreads();
        for (int sub = 0; sub < run; sub++) {
            const int at = first + sub * 512;
            if (sub > 0) target.load(at, width);
            float c[8][NT][4];
            clear<NT>(c);
            for (int block = 0; block * 16 < tile.w; block++) {
                if (RINGED) {
                    fetch();
                    wait_for_copies<RING - 1>();
                    __syncwarp();
                    read_b(b, ring + used * 16 * B_ROW, g, q);
                    used = used + 1 == RING ? 0 : used + 1;
                }
                multiply<NT>(c, b, h + block * NT * 32, lane);
                if (RINGED)
                    __syncwarp();
                else
                    fetch();
            }
            target.store(c, scale, at, width);
        }
        now = next;
        begin();
    }
}

KERNEL(expand_short_1, 128, 4, Expand, expand_short<1 COMMA false>)
KERNEL(expand_short_1_ringed, 128, 3, Expand, expand_short<1 COMMA true>)
KERNEL(expand_short_2, 128, 3, Expand, expand_short<2 COMMA false>)
