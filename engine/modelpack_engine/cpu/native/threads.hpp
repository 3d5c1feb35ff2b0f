// Threads: runs a function on all threads at once; inside it, threads share work and wait.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <sched.h>

namespace modelpack {

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

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

    // Wait until all threads have called it.
    void barrier() {
        if (count_ == 1) return;
        const unsigned now = generation_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            generation_.store(now + 1, std::memory_order_release);
        } else {
            wait_until([&] { return generation_.load(std::memory_order_acquire) != now; });
        }
    }

  private:
    static constexpr int kSpins = 4000;  // about 50 us: steps follow one another that quickly

    template <class Done> static void wait_until(Done done) {
        for (int i = 0; !done(); i++) {
            if (i < kSpins) pause_briefly();
            else sched_yield();  // another program has the core of a thread that we wait for
        }
    }

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
    std::atomic<unsigned> number_{0}, generation_{0};
    std::atomic<int> arrived_{0}, left_{0};
    const std::function<void(int)>* function_ = nullptr;
};

}  // namespace modelpack
