// Workers on threads, each with rows of its own.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

namespace skode {

using Clock = std::chrono::steady_clock;

enum Progress { DONE, UNFINISHED, OUT_OF_MEMORY };

// work(worker) on every worker that has not finished, a thread to each.
template <class Worker>
int share(std::vector<std::unique_ptr<Worker>> &workers, std::vector<char> &finished,
          double seconds) {
  const auto until =
      Clock::now() + std::chrono::duration_cast<Clock::duration>(
                         std::chrono::duration<double>(seconds));
  std::atomic<bool> failed{false};
  const auto work = [&](std::size_t n) {
    try {
      finished[n] = finished[n] || workers[n]->run(until);
    } catch (...) {
      failed = true;
    }
  };
  std::vector<std::thread> threads;
  std::size_t begun = 1;
  try {
    threads.reserve(workers.size());
    for (; begun < workers.size(); ++begun)
      threads.emplace_back(work, begun);
  } catch (...) {
    // No more threads to be had: the rest is done here.
  }
  work(0);
  for (std::size_t n = begun; n < workers.size(); ++n)
    work(n);
  for (auto &thread : threads)
    thread.join();
  if (failed)
    return OUT_OF_MEMORY;
  for (char done : finished)
    if (!done)
      return UNFINISHED;
  return DONE;
}

} // namespace skode
