// What the base products share that add LoRA's part themselves: four warps of their own compute B h of the adapted rows while
// others stream the base weights. It is added to the rounded sums, so that the bits are those of the base product and `expand` after it.

#define HELPERS 128
#define NO_DELTA (-0.f)  // adding it changes no bit

template <int ID>
static __device__ __forceinline__ void meet(int threads) {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "r"(threads) : "memory");
}

// What `expand` makes of a base product that was rounded when it was written.
static __device__ __forceinline__ float plus(float base, float delta, float scale) {
    return fmaf(delta, scale, widen(pack(base, 0.f), 0));
}

static __device__ __forceinline__ int slice_of(const Expand& p, int column) {
    int slice = 0;
    while (slice + 1 < p.slices && column >= p.begin[slice + 1]) slice++;
    return slice;
}

// The segments of at most N rows in shared memory, and the rank vectors of every sorted position.
template <int N>
struct Adapted {
    int4 tiles[N];    // slot, first position, rows, rank; high ranks first, so that warps that take them in turn have as much to do
    int rows[N];      // of each position
    int ranks[N];     // of each position
    float scales[N];  // of each row
    bool mine[N];     // whether this block of its cluster finishes a row

    // Before the predecessor has completed: segments are older. Items are dealt to blocks `deal` at a time.
    __device__ __forceinline__ void load(const Expand& p, const int* row_slots, int count, int eights, int thread, int deal,
                                         int rank, int size) {
        for (int i = thread; i < count; i += HELPERS) {
            ranks[i] = 0;
            scales[i] = 1.f;
            mine[i] = i % size == rank && row_slots[i] < 0;
            rows[i] = p.rows[i];
        }
        const int found = p.header[0];
        meet<3>(HELPERS);
        for (int number = thread; number < found; number += HELPERS) {
            const int4 tile = p.tiles[number];
            const float scale = p.scaling[tile.x];
            int t = 0;
            for (int other = 0; other < found; other++) {
                const int rank = p.tiles[other].w;
                t += rank > tile.w || (rank == tile.w && other < number);
            }
            tiles[t] = tile;
            for (int i = 0; i < tile.z; i++) {
                ranks[tile.y + i] = tile.w;
                scales[rows[tile.y + i]] = scale;
                mine[rows[tile.y + i]] = (t * eights + i / 8) / deal % size == rank;
            }
        }
        meet<3>(HELPERS);
    }

    // h [count][h_rank + 4]: pairs of ranks, the leading parts before the rests; partials are added in order, then split
    // into two numbers of the weights' type.
    __device__ __forceinline__ void gather(const Expand& p, u32* h, int count, int slice, int thread) const {
        const long long step = (long long)p.h_rows * p.slices * p.h_rank;
        const int pairs = (p.header[1] + 15) / 16 * 8, all = count * pairs;
        for (int start = thread; start < all; start += 4 * HELPERS) {
            const float* from[4];
            float low[4], high[4];
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const int i = min(start + u * HELPERS, all - 1);
                from[u] = p.h + ((long long)(i / pairs) * p.slices + slice) * p.h_rank + 2 * (i % pairs);
                low[u] = high[u] = 0.f;
            }
#pragma unroll 4
            for (int piece = 0; piece < p.pieces; piece++)
#pragma unroll
                for (int u = 0; u < 4; u++)
                    if (start + u * HELPERS < all) {
                        const float2 v = *(const float2*)(from[u] + piece * step);
                        low[u] += v.x, high[u] += v.y;
                    }
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const int i = start + u * HELPERS, at = i / pairs, pair = i % pairs;
                if (i >= all) continue;
                // Cells past the rank hold what an earlier step left there.
                const float a = 2 * pair < ranks[at] ? low[u] : 0.f, b = 2 * pair + 1 < ranks[at] ? high[u] : 0.f;
                const u32 value = pack(a, b);
                u32* to = h + at * (p.h_rank + 4) + pair;
                to[0] = value, to[p.h_rank / 2] = pack(a - widen(value, 0), b - widen(value, 1));
            }
        }
        meet<3>(HELPERS);
    }
};

// At most eight rows of one adapter. Items count the eights of a tile first.
struct Item {
    int index, first, block;
    int4 tile;
    bool valid;

    __device__ __forceinline__ void seek(const int4* tiles, int items, int eights, int from, int by) {
        block = 0;
        for (index = from; index < items; index += by) {
            tile = tiles[eights == 1 ? index : index / eights];
            first = eights == 1 ? 0 : index % eights * 8;
            if (first < tile.z) break;
        }
        valid = index < items;
    }

    // A lane's mma fragment of its sixteen ranks.
    __device__ __forceinline__ uint4 fragment(const u32* h, int h_rank, int g, int q) const {
        const u32* at = h + (tile.y + min(first + g, tile.z - 1)) * (h_rank + 4) + block * 8 + q;
        return make_uint4(at[0], at[4], at[h_rank / 2], at[h_rank / 2 + 4]);
    }
};
