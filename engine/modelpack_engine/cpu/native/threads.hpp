// Threads: runs a function on all threads at once. Work: the pieces of one phase, which the threads
// share: a phase ends when its pieces are done, so a thread that has no core holds up nobody.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <sched.h>

namespace modelpack {

constexpr int kSpins = 4000;  // about 50 us: steps follow one another that quickly

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

template <class Done> void wait_until(Done done) {
    for (int i = 0; !done(); i++) {
        if (i < kSpins) pause_briefly();
        else sched_yield();  // another program has the core of a thread that we wait for
    }
}

struct alignas(64) Work {
    std::atomic<int> next{0}, done{0};

    void reset() {
        next.store(0, std::memory_order_relaxed);
        done.store(0, std::memory_order_relaxed);
    }

    bool left(int count) const { return next.load(std::memory_order_relaxed) < count; }

    // Call `work` for pieces 0 to `count` - 1, `size` at a time; return when all are done.
    template <class Piece> void share(int count, int size, Piece work) {
        int own = 0;
        for (int from; left(count) && (from = next.fetch_add(size, std::memory_order_relaxed)) < count;) {
            const int stop = from + size < count ? from + size : count;
            for (int i = from; i < stop; i++) work(i);
            own += stop - from;
        }
        if (own) done.fetch_add(own, std::memory_order_acq_rel);
        wait_until([&] { return done.load(std::memory_order_acquire) == count; });
    }
};

// They run until the process ends: an object is never destroyed.
class Threads {
  public:
    ~Threads() = delete;
    explicit Threads(int count) : count_(count) {
        for (int i = 1; i < count; i++) std::thread([this, i] { work(i); }).detach();
    }

    int count() const { return count_; }

    // Call `function` with the number of each thread; return when all have returned.
    void run(const std::function<void(int)>& function) {
        std::lock_guard<std::mutex> one(running_);
        function_ = &function;
        left_ = count_ - 1;
        start();
        function(0);
        wait_until([this] { return left_.load(std::memory_order_acquire) == 0; });
    }

  private:
    void start() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            number_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
    }

    void work(int index) {
        for (unsigned seen = 0;;) {
            for (int i = 0; number_.load(std::memory_order_acquire) == seen && i < kSpins; i++)
                pause_briefly();
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return number_.load(std::memory_order_relaxed) != seen; });
            }
            seen++;
            (*function_)(index);
            left_.fetch_sub(1, std::memory_order_release);
        }
    }

    const int count_;
    std::mutex running_, mutex_;
    std::condition_variable wake_;
    std::atomic<unsigned> number_{0};
    std::atomic<int> left_{0};
    const std::function<void(int)>* function_ = nullptr;
};

}  // namespace modelpack
