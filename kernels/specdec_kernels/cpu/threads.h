// Loops on several threads, as at::parallel_for, on a pool whose idle threads leave their cores to other processes.
//
// OpenMP gives each thread a share of a loop and waits for all of them, so that a thread which the system runs late
// delays the step, and its threads spin after a loop. Here the calling thread takes whatever chunks no other thread has
// taken; idle threads yield their core to any other process, and sleep when there was no loop for a millisecond.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace {

inline void relax_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class ThreadPool {
 public:
  using Call = void (*)(void* job, int64_t chunk);

  // The pool of this process. It is never deleted: its threads wait until the process ends.
  static ThreadPool& instance() {
    static ThreadPool* pool = [] {
#if defined(__unix__) || defined(__APPLE__)
      pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool; });  // a child has none of the threads
#endif
      return new ThreadPool;
    }();
    return *pool;
  }

  // Calls call(job, chunk) for each chunk below `chunks`, on up to `threads` threads. Returns false, without a call,
  // where the pool is in use: by another thread of the program, or by a loop around this one.
  bool run(int64_t chunks, int64_t threads, Call call, void* job) {
    if (is_used_.exchange(true, std::memory_order_acquire)) return false;
    run_alone(chunks, threads, call, job);
    is_used_.store(false, std::memory_order_release);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    return true;
  }

 private:
  void run_alone(int64_t chunks, int64_t threads, Call call, void* job) {
    try {
      for (; num_workers_ < threads - 1; ++num_workers_)
        std::thread([this, index = num_workers_] { work(index); }).detach();
    } catch (const std::system_error&) {  // no more threads for this process: fewer of them do the same
    }
    active_.store(threads - 1, std::memory_order_relaxed);
    call_ = call, job_ = job;
    unfinished_.store(static_cast<uint32_t>(chunks), std::memory_order_relaxed);
    const uint64_t loop = (open_.load(std::memory_order_relaxed) >> 32) + 1;
    open_.store(loop << 32 | static_cast<uint64_t>(chunks), std::memory_order_release);
    loops_.store(static_cast<uint32_t>(loop), std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst)) loops_.notify_all();
    take_chunks();
    if (!spin([this] { return unfinished_.load(std::memory_order_acquire) == 0; }))
      for (uint32_t left; (left = unfinished_.load(std::memory_order_acquire)) != 0;) unfinished_.wait(left);
  }

  template <typename Done>
  static bool spin(Done is_done) {
    using Clock = std::chrono::steady_clock;
    const auto stop = Clock::now() + std::chrono::milliseconds(1);
    do {
      for (int i = 0; i < 32; ++i) {
        if (is_done()) return true;
        relax_cpu();
      }
      std::this_thread::yield();
    } while (Clock::now() < stop);
    return is_done();
  }

  // open_: the number of the loop, and how many of its chunks nobody has taken. A thread that takes one by exchanging
  // the whole word has the loop's job: the loop does not end before this chunk.
  void take_chunks() {
    for (uint64_t seen = open_.load(std::memory_order_acquire); static_cast<uint32_t>(seen) != 0;) {
      if (!open_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      try {
        call_(job_, static_cast<int64_t>(static_cast<uint32_t>(seen)) - 1);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex_);
        error_ = std::current_exception();
      }
      if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
      seen = open_.load(std::memory_order_acquire);
    }
  }

  void work(int64_t index) {
    for (uint32_t seen = 0;;) {
      const auto is_next = [&] { return loops_.load(std::memory_order_acquire) != seen; };
      if (!spin(is_next)) {
        ++sleeping_;
        while (!is_next()) loops_.wait(seen);
        --sleeping_;
      }
      seen = loops_.load(std::memory_order_acquire);
      if (index < active_.load(std::memory_order_relaxed)) take_chunks();
    }
  }

  std::atomic<bool> is_used_{false};
  std::mutex error_mutex_;
  int64_t num_workers_ = 0;
  Call call_ = nullptr;
  void* job_ = nullptr;
  std::exception_ptr error_;
  alignas(64) std::atomic<uint64_t> open_{0};
  alignas(64) std::atomic<uint32_t> unfinished_{0};
  alignas(64) std::atomic<uint32_t> loops_{0};
  std::atomic<int64_t> active_{0};
  std::atomic<uint32_t> sleeping_{0};
};

// Calls f(begin, end) for parts of begin … end, at least `grain` long, on PyTorch's number of threads. The parts are
// contiguous, and more than the threads, so that one which is late leaves its parts to the others.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  constexpr int64_t CHUNKS = 4;  // of each thread
  const int64_t count = end - begin;
  if (count <= 0) return;
  const int64_t threads = count > grain && !at::in_parallel_region() ? at::get_num_threads() : 1;
  const int64_t size = std::max(grain, (count + CHUNKS * threads - 1) / (CHUNKS * threads));
  struct Job {
    int64_t begin, end, size;
    const F& f;
  } job{begin, end, size, f};
  const auto call = [](void* of, int64_t chunk) {
    const Job& job = *static_cast<const Job*>(of);
    const int64_t first = job.begin + chunk * job.size;
    job.f(first, std::min(job.end, first + job.size));
  };
  const int64_t chunks = (count + size - 1) / size;
  if (threads > 1 && chunks > 1 && ThreadPool::instance().run(chunks, threads, call, &job)) return;
  f(begin, end);
}

}  // namespace
