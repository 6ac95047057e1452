// Threads that help with a loop if they come in time.
//
// An OpenMP loop ends when every thread has come to its barrier, even one that found nothing left to do because another
// process had its core: on a machine that also runs the clients, a step of a hundred loops then costs a hundred time
// slices. Here the caller takes tasks like everybody else and waits only for tasks that a helper has begun.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace fairlead {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    // One for the process. It is never destroyed: its threads sleep until the process ends. A forked child, which has none of
    // them, gets its own.
    static Pool& get() { return *current(); }

    int num_threads() const { return num_threads_.load(std::memory_order_relaxed); }
    void set_num_threads(int64_t num) { num_threads_ = (int)std::clamp<int64_t>(num, 1, MAX_THREADS); }

    // Calls task(i) for 0 <= i < num_tasks, on at most `num_threads` threads; tasks do not throw. A second caller at the same
    // time, and a task itself, compute alone.
    template <typename Task>
    void run(int64_t num_tasks, int64_t num_threads, const Task& task) {
        num_threads = std::min({num_threads, num_tasks, (int64_t)this->num_threads()});
        if (num_threads <= 1 || busy_.exchange(true, std::memory_order_acquire)) {
            for (int64_t i = 0; i < num_tasks; i++) task(i);
            return;
        }
        call_ = [](const void* context, int64_t i) { (*(const Task*)context)(i); };
        context_ = &task;
        num_tasks_ = num_tasks;
        num_helpers_ = (int)num_threads - 1;
        next_.store(0, std::memory_order_relaxed);
        start_helpers();
        epoch_.fetch_add(1);  // odd: open
        if (sleeping_.load() > 0) epoch_.notify_all();
        take_tasks();
        epoch_.fetch_add(1);  // even: closed, nobody else comes
        for (int spins = 0; active_.load() > 0; spins++) spins < SPINS ? relax() : std::this_thread::yield();
        busy_.store(false, std::memory_order_release);
    }

  private:
    static constexpr int MAX_THREADS = 256;
    // About 100 microseconds: longer than the gaps between the loops of a step.
    static constexpr int SPINS = 2000;

    explicit Pool(int num_threads) : num_threads_(num_threads) {}

    static Pool*& current() {
        static Pool* pool = [] {
#if defined(__unix__) || defined(__APPLE__)
            pthread_atfork(nullptr, nullptr, [] { current() = new Pool(current()->num_threads()); });
#endif
            return new Pool(std::clamp(at::get_num_threads(), 1, MAX_THREADS));
        }();
        return pool;
    }

    void start_helpers() {
        try {
            for (; started_ < num_helpers_; started_++) std::thread(&Pool::help, this, started_).detach();
        } catch (const std::system_error&) {
            // The process may have no more threads: those that there are compute.
        }
    }

    void take_tasks() {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < num_tasks_;) call_(context_, i);
    }

    void help(int index) {
        for (uint32_t seen = 0;;) {
            uint32_t epoch = epoch_.load();
            for (int spins = 0; epoch == seen || epoch % 2 == 0; epoch = epoch_.load()) {
                if (++spins < SPINS) {
                    relax();
                } else {
                    sleeping_.fetch_add(1);
                    epoch_.wait(epoch);
                    sleeping_.fetch_sub(1);
                    spins = 0;
                }
            }
            seen = epoch;
            // First counted, then looked again: either the caller waits for this helper or the helper finds the loop closed.
            active_.fetch_add(1);
            if (epoch_.load() == epoch && index < num_helpers_) take_tasks();
            active_.fetch_sub(1);
        }
    }

    std::atomic<int> num_threads_;
    std::atomic<bool> busy_{false};
    int started_ = 0;
    // Of the open loop: written before it opens, read by those who are counted in.
    void (*call_)(const void*, int64_t) = nullptr;
    const void* context_ = nullptr;
    int64_t num_tasks_ = 0;
    int num_helpers_ = 0;
    alignas(64) std::atomic<uint32_t> epoch_{0};
    std::atomic<int> sleeping_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> active_{0};
};

// As at::parallel_for: fn(begin, end) over pieces of at least `grain`.
template <typename Fn>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Fn& fn) {
    const int64_t size = end - begin;
    if (size <= 0) return;
    Pool& pool = Pool::get();
    // Several pieces for each thread: a disturbed one takes fewer.
    const int64_t pieces = std::clamp<int64_t>(size / std::max<int64_t>(grain, 1), 1, 4 * (int64_t)pool.num_threads());
    pool.run(pieces, pieces, [&](int64_t i) { fn(begin + size * i / pieces, begin + size * (i + 1) / pieces); });
}

}  // namespace fairlead
