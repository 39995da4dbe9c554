// A small pool of worker threads, and scratch memory that lives as long as its thread.
// Own threads because a second OpenMP runtime beside torch's would spin against it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sk {

// Runs body(context, task) for every task in [0, tasks) on at most `threads` threads (the caller is one of them);
// returns when all are done. Tasks are handed out in ascending order. threads <= 1 or tasks <= 1: no pool at all.
// Calls from several threads at once are safe: whoever finds the pool busy works alone.
void parallel_run(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context);

template <class Body>
void parallel_for(int64_t tasks, int threads, Body&& body) {
    parallel_run(
        tasks, threads, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// At least `bytes` of 64-byte-aligned memory owned by this thread, its contents undefined. A later call with the
// same slot may move it; different slots never overlap. Large buffers ask for huge pages.
inline constexpr int kScratchSlots = 8;
void* scratch(int slot, size_t bytes);

}  // namespace sk
