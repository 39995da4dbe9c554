// The emulator's engine: the threads of a kernel as fibers, their meetings, and whatever lands later.
//
// A kernel template compiled by g++ runs here unchanged. Threads switch only where the hardware may make them wait, so
// an order of running them is a schedule: ascending, descending or seeded random. Copies and matrix products that the
// hardware performs asynchronously are performed as late as the schedule allows (ascending), at once (descending) or
// at any time between (random); a kernel that is right under all three waits for what it uses and frees nothing early.
// What it cannot prove: memory ordering between ordinary loads and stores, and speed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace emu {

struct Dim {
    unsigned x = 1, y = 1, z = 1;
    unsigned count() const { return x * y * z; }
};

enum class Order { ascending, descending, random };

// Set by tests before a launch.
struct Schedule {
    Order order = Order::ascending;
    uint64_t seed = 0;
};
void set_schedule(Schedule schedule);

// Runs `kernel` for every thread of the grid; cluster.x blocks run together. Throws std::runtime_error with each
// thread's place on a deadlock, and with the thread's place on a violated rule.
void launch(Dim grid, unsigned cluster, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);

// Who is running -------------------------------------------------------------------------------------------------
unsigned thread_index();
unsigned block_threads();
Dim block_index();
Dim grid_size();
unsigned cluster_rank();
unsigned cluster_size();

// Shared memory: an address is the rank of its block in the cluster << 24, and an offset that begins at 1024.
char* shared_memory();
uint32_t shared_address(const void* p);
char* shared_pointer(uint32_t address);
uint32_t map_to_rank(uint32_t address, unsigned rank);

// Waiting --------------------------------------------------------------------------------------------------------
[[noreturn]] void fail(const std::string& what);
void wait_until(const char* what, bool (*ready)(void*), void* context);

template <class Ready>
void wait_for(const char* what, Ready ready) {
    wait_until(what, [](void* context) { return (*static_cast<Ready*>(context))(); }, &ready);
}

// A meeting of `count` threads (a warp's 32, a warpgroup's 128): the last to come runs act(slots, count), in which
// slots[i] is what the group's i-th thread brought. Threads that meet under different names are an error.
using Act = void (*)(void** slots, void* context);
void meet_warp(const char* name, void* slot, Act act, void* context = nullptr);
void meet_warpgroup(const char* name, void* slot, Act act, void* context = nullptr);
void block_barrier(unsigned id, unsigned threads);
void cluster_barrier();

// Asynchronous work: performed by the engine when the schedule says so, in any order.
void perform_later(std::function<void()> work);
// Like it, but the thread's own groups decide when it must have happened (cp.async): `early` says whether it may
// happen at once.
bool early();

// cp.async groups of the running thread.
void copy_later(std::function<void()> copy);
void commit_copies();
void wait_copies(unsigned pending);

// Product groups of the running warpgroup (wgmma): called by one thread per group, inside a meeting.
void product_later(std::function<void()> product);
void commit_products();
void wait_products(unsigned pending);

}  // namespace emu
