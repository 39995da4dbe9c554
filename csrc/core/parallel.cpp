#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace sk {
namespace {

constexpr int kSpins = 4000;  // about 20 microseconds before a waiting thread sleeps

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

class Pool {
public:
    void run(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context) {
        std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
        if (!busy.owns_lock()) {
            for (int64_t t = 0; t < tasks; ++t) body(context, t);
            return;
        }
        const int helpers = static_cast<int>(tasks < threads ? tasks : threads) - 1;
        grow(helpers);
        body_ = body, context_ = context, tasks_ = tasks;
        next_.store(0, std::memory_order_relaxed);
        wanted_ = helpers;
        running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(sleep_);
            generation_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        work();
        for (int spin = 0; running_.load(std::memory_order_acquire) != 0; ++spin)
            spin < kSpins ? pause() : std::this_thread::yield();
    }

private:
    void work() {
        for (int64_t t; (t = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) body_(context_, t);
    }

    void grow(int helpers) {
        while (static_cast<int>(workers_.size()) < helpers) {
            const int index = static_cast<int>(workers_.size());
            workers_.emplace_back([this, index, seen = generation_.load()] { serve(index, seen); });
            workers_.back().detach();
        }
    }

    void serve(int index, uint64_t seen) {
        for (;;) {
            for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spin) pause();
            if (generation_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
            }
            ++seen;  // run() waits for every worker, so no generation is ever skipped
            if (index < wanted_) work();
            running_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex busy_, sleep_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<int> running_{0};
    void (*body_)(void*, int64_t) = nullptr;
    void* context_ = nullptr;
    int64_t tasks_ = 0;
    int wanted_ = 0;
};

// What a team of OpenMP works on.
struct Region {
    void (*body)(void*, int64_t);
    void* context;
    int64_t tasks;
    std::atomic<int64_t> next{0};

    static void join(void* data) {
        Region& r = *static_cast<Region*>(data);
        for (int64_t t; (t = r.next.fetch_add(1, std::memory_order_relaxed)) < r.tasks;) r.body(r.context, t);
    }
};

std::atomic<OpenMp> g_openmp{nullptr};

// Never destroyed: its detached workers outlive static destruction. A forked child starts with a fresh one,
// because threads do not survive fork().
Pool* g_pool = nullptr;
std::once_flag g_once;

Pool& pool() {
    std::call_once(g_once, [] {
        g_pool = new Pool;
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; });
#endif
    });
    return *g_pool;
}

// Makes sure that a forked child finds none.
void forget_openmp_in_children() {
#if defined(__unix__) || defined(__APPLE__)
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { g_openmp.store(nullptr); }); });
#endif
}

struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
};

}  // namespace

void parallel_run(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context) {
    if (threads <= 1 || tasks <= 1) {
        for (int64_t t = 0; t < tasks; ++t) body(context, t);
        return;
    }
    if (const OpenMp openmp = g_openmp.load(std::memory_order_relaxed)) {
        // Always a team of torch's size, even for fewer tasks: another size would end threads and start others.
        Region region{body, context, tasks};
        openmp(Region::join, &region, static_cast<unsigned>(threads), 0);
        return;
    }
    pool().run(tasks, threads, body, context);
}

void share_threads(OpenMp entry) {
    forget_openmp_in_children();
    g_openmp.store(entry);
}

void* scratch(int slot, size_t bytes) {
    static thread_local Buffer buffers[kScratchSlots];
    Buffer& b = buffers[slot];
    if (b.size < bytes) {
        std::free(b.data);
        b.data = nullptr, b.size = 0;
        constexpr size_t kHuge = size_t(2) << 20;
        const size_t align = bytes >= kHuge ? kHuge : 64;
        const size_t size = (bytes + bytes / 4 + align - 1) / align * align;
        b.data = std::aligned_alloc(align, size);
        if (!b.data) throw std::bad_alloc();
        b.size = size;
#if defined(__linux__)
        if (align == kHuge) madvise(b.data, size, MADV_HUGEPAGE);
#endif
    }
    return b.data;
}

}  // namespace sk
