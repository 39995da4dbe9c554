#include "engine.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace emu {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr uint32_t kFirst = 1024;  // shared memory begins at this address
constexpr size_t kCanary = 1024;   // bytes after it that a kernel must not touch
constexpr unsigned kNamedBarriers = 16;

struct Meeting {
    const char* name = nullptr;
    unsigned arrived = 0;
    uint64_t generation = 0;
    std::vector<void*> slots;
};

using Work = std::function<void()>;

// Groups of work in the order of commitment; the last one is open.
struct Groups {
    std::deque<std::vector<Work>> closed;
    std::vector<Work> open;
};

struct Barrier {
    unsigned arrived = 0, expected = 0;
    uint64_t generation = 0;
};

struct Block;

struct Thread {
    ucontext_t context;
    void* stack = nullptr;
    Block* block = nullptr;
    unsigned index = 0;
    bool done = false;
    const char* waits = nullptr;
    bool (*ready)(void*) = nullptr;
    void* ready_context = nullptr;
    Groups copies;
};

struct Block {
    Dim index;
    unsigned rank = 0;
    std::vector<char> memory;
    char* shared = nullptr;
    size_t bytes = 0;
    std::vector<Meeting> warps, warpgroups;
    std::vector<Groups> products;
    Barrier barriers[kNamedBarriers];
};

struct Run {
    Dim grid;
    unsigned cluster = 1, threads = 0;
    const std::function<void()>* kernel = nullptr;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<Thread> fibers;
    Barrier cluster_barrier;
    std::vector<Work> later;
    ucontext_t scheduler;
    Thread* running = nullptr;
    std::string error;
    Schedule schedule;
    std::mt19937_64 random;
};

Schedule the_schedule;
thread_local Run* run = nullptr;
std::vector<void*> free_stacks;

void* new_stack() {
    if (!free_stacks.empty()) {
        void* stack = free_stacks.back();
        free_stacks.pop_back();
        return stack;
    }
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack, 4096, PROT_NONE);  // an overflow faults instead of eating its neighbour
    return stack;
}

bool chance(double p) { return std::uniform_real_distribution<>(0, 1)(run->random) < p; }

std::string block_name(const Thread& t) {
    const Dim& b = t.block->index;
    return "block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ")";
}

std::string place(const Thread& t) { return block_name(t) + ", thread " + std::to_string(t.index); }

void entry() {
    (*run->kernel)();
    run->running->done = true;
    swapcontext(&run->running->context, &run->scheduler);
}

void begin(Thread& thread, Block& block, unsigned index) {
    thread.block = &block;
    thread.index = index;
    thread.stack = new_stack();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, entry, 0);
}

void perform(std::vector<Work>& group) {
    for (Work& work : group) work();
    group.clear();
}

void wait_groups(Groups& groups, unsigned pending) {
    while (groups.closed.size() > pending) {
        perform(groups.closed.front());
        groups.closed.pop_front();
    }
}

void meet(Meeting& meeting, unsigned count, unsigned index, const char* name, void* slot, Act act, void* context) {
    if (meeting.arrived && std::strcmp(meeting.name, name) != 0) {
        fail(std::string("threads of one group diverge: one at ") + meeting.name + ", one at " + name);
    }
    meeting.slots.resize(count);
    meeting.name = name;
    meeting.slots[index] = slot;
    const uint64_t generation = meeting.generation;
    if (++meeting.arrived == count) {
        act(meeting.slots.data(), context);
        meeting.arrived = 0;
        meeting.generation++;
    } else {
        wait_for(name, [&] { return meeting.generation != generation; });
    }
}

void arrive_and_wait(Barrier& barrier, unsigned expected, const char* name) {
    if (barrier.arrived && barrier.expected != expected) fail(std::string(name) + ": threads expect different counts");
    barrier.expected = expected;
    const uint64_t generation = barrier.generation;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        barrier.generation++;
    } else {
        wait_for(name, [&] { return barrier.generation != generation; });
    }
}

bool can_run(const Thread& thread) { return !thread.done && (!thread.ready || thread.ready(thread.ready_context)); }

void step(Thread& thread) {
    thread.ready = nullptr;
    run->running = &thread;
    swapcontext(&run->scheduler, &thread.context);
    run->running = nullptr;
}

void perform_one_later() {
    const size_t i = run->schedule.order == Order::random ? run->random() % run->later.size() : 0;
    Work work = std::move(run->later[i]);
    run->later.erase(run->later.begin() + i);
    work();
}

// Each thread's place: by block and what they wait at, as ranges of threads.
std::string deadlock() {
    std::map<std::tuple<unsigned, unsigned, std::string>, std::vector<const Thread*>> places;
    for (const Thread& t : run->fibers) {
        const Dim& b = t.block->index;
        if (!t.done) places[{b.y, b.x, t.waits ? t.waits : "start"}].push_back(&t);
    }
    std::string text = "deadlock";
    for (const auto& [at, threads] : places) {
        text += text == "deadlock" ? ": " : "; ";
        text += block_name(*threads.front()) + " threads";
        for (size_t i = 0; i < threads.size();) {
            size_t last = i;
            while (last + 1 < threads.size() && threads[last + 1]->index == threads[last]->index + 1) ++last;
            text += (i ? ", " : " ") + std::to_string(threads[i]->index);
            if (last > i) text += "-" + std::to_string(threads[last]->index);
            i = last + 1;
        }
        text += " wait at " + std::get<2>(at);
    }
    return text;
}

void run_cluster() {
    std::vector<unsigned> order(run->fibers.size());
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    if (run->schedule.order == Order::descending) std::reverse(order.begin(), order.end());
    for (;;) {
        if (run->schedule.order == Order::random) std::shuffle(order.begin(), order.end(), run->random);
        bool progress = false, left = false;
        for (unsigned i : order) {
            Thread& thread = run->fibers[i];
            left |= !thread.done;
            if (!can_run(thread)) continue;
            progress = true;
            if (run->schedule.order == Order::random && chance(0.3)) continue;  // held back for a while
            step(thread);
            if (!run->error.empty()) return;
        }
        if (!left) break;
        if (run->schedule.order == Order::random && !run->later.empty() && chance(0.3)) {
            perform_one_later();
            progress = true;
        }
        if (!progress && !run->later.empty()) {
            perform_one_later();
            progress = true;
        }
        if (!progress) {
            run->error = deadlock();
            return;
        }
        if (!run->error.empty()) return;
    }
    if (!run->later.empty()) run->error = "the kernel ended before a copy that it had begun";
    for (auto& block : run->blocks) {
        for (size_t i = 0; i < kCanary; ++i) {
            if (block->shared[block->bytes + i] != '\xC5') run->error = "a write beyond the end of shared memory";
        }
        for (Groups& groups : block->products) {
            if (!groups.open.empty() || !groups.closed.empty()) run->error = "the kernel ended before a wgmma's wait";
        }
    }
}

}  // namespace

void set_schedule(Schedule schedule) { the_schedule = schedule; }

void launch(Dim grid, unsigned cluster, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
    if (threads == 0 || threads > 1024 || threads % 32) throw std::runtime_error("a block needs 32..1024 threads");
    if (grid.x % cluster) throw std::runtime_error("the grid is no whole number of clusters");
    if (shared_bytes > 227 * 1024) throw std::runtime_error("more shared memory than a Hopper SM has");
    std::vector<unsigned> clusters(grid.count() / cluster);
    for (unsigned i = 0; i < clusters.size(); ++i) clusters[i] = i;
    std::mt19937_64 random(the_schedule.seed);
    if (the_schedule.order == Order::descending) std::reverse(clusters.begin(), clusters.end());
    if (the_schedule.order == Order::random) std::shuffle(clusters.begin(), clusters.end(), random);
    for (unsigned c : clusters) {
        Run now;
        run = &now;
        now.grid = grid;
        now.cluster = cluster;
        now.threads = threads;
        now.kernel = &kernel;
        now.schedule = the_schedule;
        now.random.seed(random());
        now.fibers = std::vector<Thread>(size_t{cluster} * threads);
        for (unsigned r = 0; r < cluster; ++r) {
            auto block = std::make_unique<Block>();
            const unsigned flat = c * cluster + r;
            block->index = {flat % grid.x, flat / grid.x % grid.y, flat / (grid.x * grid.y)};
            block->rank = r;
            block->bytes = shared_bytes;
            block->memory.assign(shared_bytes + kCanary + 2 * kFirst, '\xC5');
            const auto base = reinterpret_cast<uintptr_t>(block->memory.data());
            block->shared = block->memory.data() + (kFirst - base % kFirst) % kFirst;
            std::memset(block->shared, 0xFF, shared_bytes);  // NaN in every floating type
            block->warps.resize((threads + 31) / 32);
            block->warpgroups.resize((threads + 127) / 128);
            block->products.resize(block->warpgroups.size());
            for (unsigned t = 0; t < threads; ++t) {
                begin(now.fibers[r * threads + t], *block, t);
            }
            now.blocks.push_back(std::move(block));
        }
        run_cluster();
        for (Thread& thread : now.fibers) free_stacks.push_back(thread.stack);
        run = nullptr;
        if (!now.error.empty()) throw std::runtime_error("emulator: " + now.error);
    }
}

unsigned thread_index() { return run->running->index; }
unsigned block_threads() { return run->threads; }
Dim block_index() { return run->running->block->index; }
Dim grid_size() { return run->grid; }
unsigned cluster_rank() { return run->running->block->rank; }
unsigned cluster_size() { return run->cluster; }

char* shared_memory() { return run->running->block->shared; }

uint32_t shared_address(const void* p) {
    const Block& block = *run->running->block;
    const auto* c = static_cast<const char*>(p);
    if (c < block.shared || c > block.shared + block.bytes)
        fail("the address of something that is not in shared memory");
    return block.rank << 24 | (kFirst + static_cast<uint32_t>(c - block.shared));
}

char* shared_pointer(uint32_t address) {
    const uint32_t rank = address >> 24, offset = address & 0xFFFFFF;
    if (rank >= run->blocks.size()) fail("a shared address of a block that is not in the cluster");
    Block& block = *run->blocks[rank];
    if (offset < kFirst || offset >= kFirst + block.bytes) fail("an access outside of shared memory");
    return block.shared + (offset - kFirst);
}

uint32_t map_to_rank(uint32_t address, unsigned rank) { return (address & 0xFFFFFF) | rank << 24; }

void fail(const std::string& what) {
    if (!run || !run->running) throw std::runtime_error("emulator: " + what);
    run->error = place(*run->running) + ": " + what;
    swapcontext(&run->running->context, &run->scheduler);  // never resumed
    std::abort();
}

void wait_until(const char* what, bool (*ready)(void*), void* context) {
    Thread& thread = *run->running;
    thread.waits = what;
    thread.ready = ready;
    thread.ready_context = context;
    swapcontext(&thread.context, &run->scheduler);
}

void meet_warp(const char* name, void* slot, Act act, void* context) {
    Thread& t = *run->running;
    meet(t.block->warps[t.index / 32], 32, t.index % 32, name, slot, act, context);
}

void meet_warpgroup(const char* name, void* slot, Act act, void* context) {
    Thread& t = *run->running;
    if (t.index / 128 * 128 + 128 > run->threads) fail(std::string(name) + ": a warpgroup without all of its warps");
    meet(t.block->warpgroups[t.index / 128], 128, t.index % 128, name, slot, act, context);
}

void block_barrier(unsigned id, unsigned threads) {
    if (id >= kNamedBarriers || threads % 32) fail("no such named barrier");
    arrive_and_wait(run->running->block->barriers[id], threads, id ? "a named barrier" : "the block's barrier");
}

void cluster_barrier() { arrive_and_wait(run->cluster_barrier, run->cluster * run->threads, "the cluster's barrier"); }

bool early() {
    switch (run->schedule.order) {
        case Order::ascending: return false;
        case Order::descending: return true;
        default: return chance(0.5);
    }
}

void perform_later(Work work) {
    if (run->schedule.order == Order::descending) return work();
    run->later.push_back(std::move(work));
}

void copy_later(Work copy) {
    if (early()) return copy();
    run->running->copies.open.push_back(std::move(copy));
}

void commit_copies() {
    Groups& groups = run->running->copies;
    groups.closed.push_back(std::move(groups.open));
    groups.open.clear();
}

void wait_copies(unsigned pending) { wait_groups(run->running->copies, pending); }

namespace {
Groups& products() {
    Thread& t = *run->running;
    return t.block->products[t.index / 128];
}
}  // namespace

void product_later(Work product) {
    if (early() && products().open.empty() && products().closed.empty()) return product();
    products().open.push_back(std::move(product));
}

void commit_products() {
    Groups& groups = products();
    groups.closed.push_back(std::move(groups.open));
    groups.open.clear();
}

void wait_products(unsigned pending) { wait_groups(products(), pending); }

}  // namespace emu
