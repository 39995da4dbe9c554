// Threads to share work with, and scratch memory that lives as long as its thread.
//
// They are those of the OpenMP runtime that torch itself runs on, where it has one (share_threads): its waiting threads
// spin for a while after every call, and any others would have to fight them for the cores. Elsewhere a small pool of
// our own serves.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sk {

// Runs body(context, task) for every task in [0, tasks) on at most `threads` threads (the caller is one of them);
// returns when all are done. Tasks are handed out in ascending order. threads <= 1 or tasks <= 1: no pool at all.
// Calls from several threads at once are safe: each has its own team, or whoever finds our own pool busy works alone.
void parallel_run(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context);

// OpenMP's entry for a parallel region, as g++ calls it: fn(data) on every thread of a team of this size.
using OpenMp = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
// From now on work is shared in such regions (null: in our own pool). A forked child goes back to its own pool, because
// GNU's runtime does not survive fork().
void share_threads(OpenMp entry);

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
