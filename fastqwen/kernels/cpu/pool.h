// Threads that share one piece of work at a time.
//
// Parts are taken from an atomic cursor, so a thread that the system gives no time takes none; the caller works too, and
// waits only for parts that were begun, never for a thread that has not woken up. Threads look for work for some
// microseconds after the last, as long as a step's calls follow each other, and then sleep.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastqwen {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One pool for all sources of the library, and for no other library that the process has loaded.
class [[gnu::visibility("hidden")]] Pool {
 public:
  // The pool lives as long as the process: its threads may be asleep when static objects are destroyed.
  static Pool& shared() {
    static Pool* pool = new Pool;
    return *pool;
  }

  // How many threads compute, the caller's included.
  void resize(int threads) {
    std::lock_guard<std::mutex> alone(busy_);
    limit_.store(threads - 1);
    while (made_ < threads - 1) {
      std::thread(&Pool::serve, this, made_).detach();
      made_++;
    }
  }

  int threads() const { return limit_.load(std::memory_order_relaxed) + 1; }

  // part(0) to part(count - 1), in any order and by any thread. A second caller at the same time computes alone.
  template <typename F>
  void run(int64_t count, F&& part) {
    std::unique_lock<std::mutex> alone(busy_, std::defer_lock);
    if (count < 2 || threads() < 2 || !alone.try_lock()) {
      for (int64_t i = 0; i < count; i++) part(i);
      return;
    }
    const Call call = [](void* context, int64_t i) { (*static_cast<F*>(context))(i); };
    call_.store(call, std::memory_order_relaxed);
    context_.store(const_cast<void*>(static_cast<const void*>(&part)), std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint64_t job = ((left_.load(std::memory_order_relaxed) >> 32) + 1) << 32;
    left_.store(job | static_cast<uint32_t>(count));
    if (asleep_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    work();
    const auto is_done = [&] { return done_.load() == count; };
    for (int looks = 0; looks < LOOKS && !is_done(); looks++) relax();
    if (is_done()) return;
    std::unique_lock<std::mutex> lock(sleep_);  // the system took a thread's processor away in the midst of a part
    waits_.store(true);
    finished_.wait(lock, is_done);
    waits_.store(false);
  }

 private:
  using Call = void (*)(void*, int64_t);
  static constexpr int LOOKS = 2000;  // some tens of microseconds

  static uint32_t parts(uint64_t left) { return static_cast<uint32_t>(left); }

  // Takes parts until none is left. What is read of a job before a part of it was taken is right if it could be taken: a
  // job with a part left is not over, and its fields change only after it is.
  void work() {
    for (uint64_t left = left_.load(std::memory_order_acquire); parts(left) > 0;) {
      const Call call = call_.load(std::memory_order_relaxed);
      void* context = context_.load(std::memory_order_relaxed);
      if (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      call(context, parts(left) - 1);
      done_.fetch_add(1);
      if (waits_.load()) {
        std::lock_guard<std::mutex> lock(sleep_);
        finished_.notify_one();
      }
      left = left_.load(std::memory_order_acquire);
    }
  }

  bool has_work(int index) const { return index < limit_.load() && parts(left_.load()) > 0; }

  void serve(int index) {
    for (;;) {
      int looks = 0;
      while (!has_work(index) && looks < LOOKS) { relax(); looks++; }
      if (looks == LOOKS) {
        std::unique_lock<std::mutex> lock(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return has_work(index); });
        asleep_.fetch_sub(1);
      }
      work();
    }
  }

  std::mutex busy_, sleep_;
  std::condition_variable wake_, finished_;
  std::atomic<uint64_t> left_{0};  // which job this is, and in the lower half how many of its parts nobody has taken
  std::atomic<int64_t> done_{0};
  std::atomic<Call> call_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int> asleep_{0}, limit_{0};
  std::atomic<bool> waits_{false};
  int made_ = 0;
};

}  // namespace fastqwen

namespace {

using fastqwen::Pool;

// parts of ``size`` of ``count`` things: body(first, last)
template <typename F>
inline void in_parts(int64_t count, int64_t size, F&& body) {
  Pool::shared().run((count + size - 1) / size, [&](int64_t i) {
    const int64_t first = i * size, last = first + size < count ? first + size : count;
    body(first, last);
  });
}

// Parts so large that handing them out costs little, and so small that threads end together.
inline int64_t part_size(int64_t count, int64_t cost_of_one) {
  constexpr int64_t COST = 16384;  // numbers that are worth a part
  const int64_t small = COST / (cost_of_one > 0 ? cost_of_one : 1) + 1;
  const int64_t even = count / (8 * Pool::shared().threads());
  return even > small ? even : small;
}

}  // namespace
