// How kernels are launched: one stream, in which a launch may begin before its predecessor has ended.

typedef std::function<void()> (*Kernel)(void**);  // the launch with these arguments
inline std::map<std::string, Kernel>& known() { static std::map<std::string, Kernel> all; return all; }
struct Register { Register(const char* name, Kernel kernel) { known()[name] = kernel; } };
#define KERNEL(NAME, THREADS, BLOCKS, ARGS, BODY)               \
    static Register NAME##_known(#NAME, [](void** a) {          \
        const ARGS p = *(const ARGS*)a[0];                      \
        return std::function<void()>([p] { BODY(p); });         \
    });

#define STACK (1 << 16)
#define PATIENCE_S 60  // a launch that takes longer is taken for one that never ends

inline void start() {
    running->launch->kernel();
    running->current->done = true;
    release(*running->current);
    leave();
}

inline void go_on(Fiber& fiber) {
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.beginning);
}

// Runs the block's fibers in turn, up and down, until all have ended or the launch is given up.
inline void run(Block& mine) {
    running = &mine;
    Launch& launch = *mine.launch;
    const int count = (int)mine.fibers.size();
    char* stacks = (char*)mmap(nullptr, (size_t)count * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (int i = 0; i < count; i++) {
        Fiber& fiber = mine.fibers[i];
        fiber.index = {(u32)i};
        getcontext(&fiber.beginning);
        fiber.beginning.uc_stack.ss_sp = stacks + (size_t)i * STACK;
        fiber.beginning.uc_stack.ss_size = STACK;
        makecontext(&fiber.beginning, start, 0);
    }
    const auto begun = std::chrono::steady_clock::now();
    bool idle = false, up = true;
    for (int left = count; left > 0 && !launch.hopeless; up = !up) {
        bool moved = false;
        for (int i = 0; i < count; i++) {
            Fiber& fiber = mine.fibers[up ? i : count - 1 - i];
            if (fiber.done || (fiber.ready && !fiber.ready())) continue;
            fiber.ready = nullptr;
            mine.current = &fiber;
            if (_setjmp(mine.scheduler) == 0) go_on(fiber);
            left -= fiber.done, moved = true;
        }
        for (auto& box : mine.boxes) box(), moved = true;
        mine.boxes.clear();
        if (!moved && !idle) launch.idle++, idle = true;
        if (!moved) std::this_thread::yield();
        if (std::chrono::steady_clock::now() - begun > std::chrono::seconds(PATIENCE_S)) launch.hopeless = true;
    }
    if (!idle) launch.idle++;
    munmap(stacks, (size_t)count * STACK);
}

inline void wait_and_run(Launch& mine) {
    auto may_start = [&] {
        const Launch* before = mine.previous.get();
        return mine.wanted && (!before || before->ended || (mine.early && before->all(before->released)));
    };
    while (!may_start()) std::this_thread::sleep_for(std::chrono::microseconds(20));
    std::vector<std::thread> threads;
    for (Block& b : mine.blocks) threads.emplace_back([&] { run(b); });
    for (std::thread& t : threads) t.join();
    mine.memory.clear();
    mine.ended = true;
}

inline std::vector<std::shared_ptr<Launch>>& issued() { static std::vector<std::shared_ptr<Launch>> all; return all; }

// One stream. A launch waits for the next to be issued, or for `synchronize`, so that it is known whom it may let start.
extern "C" int launch(const char* name, int grid, int threads, void** arguments, int shared_bytes, int cluster, int early) {
    const auto found = known().find(name);
    if (found == known().end()) return 1;
    auto made = std::make_shared<Launch>();
    made->name = name, made->kernel = found->second(arguments), made->early = early;
    made->blocks = std::vector<Block>(grid);
    made->clusters = std::vector<Cluster>(grid / cluster);
    for (int i = 0; i < grid; i++) {
        made->memory.emplace_back(new char[shared_bytes + 1024]);
        memset(made->memory.back().get(), 0xff, shared_bytes + 1024);  // NaN: nothing is there until it is written
        Block& b = made->blocks[i];
        b.index = {(u32)i}, b.grid = {(u32)grid}, b.size = {(u32)threads};
        b.launch = made.get(), b.cluster = &made->clusters[i / cluster], b.rank = i % cluster;
        b.shared = (char*)(((u64)made->memory.back().get() + 1023) & ~1023ull);
        b.fibers = std::vector<Fiber>(threads);
        b.cluster->blocks.push_back(&b);
    }
    if (!issued().empty()) {
        made->previous = issued().back();
        if (early) made->previous->next = made.get();
        made->previous->wanted = true;
    }
    issued().push_back(made);
    made->thread = std::thread([made] { wait_and_run(*made); });
    return 0;
}

// Waits for all launches; the first that never ended into `name`, if there is one.
extern "C" int synchronize(char* name, int room) {
    if (!issued().empty()) issued().back()->wanted = true;
    int code = 0;
    for (auto& launch : issued()) {
        launch->thread.join();
        if (launch->hopeless && code == 0) code = 2, snprintf(name, room, "%s", launch->name.c_str());
    }
    issued().clear();
    return code;
}
