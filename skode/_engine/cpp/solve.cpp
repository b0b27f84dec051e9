// The doors: one solve, its gradient, its end. Compiled where it runs, for one type
// (SKODE_REAL) and one activation (SKODE_ACTIVATION); see build.py.
//
// Rows are shared out among threads in even ranges. A call works for some seconds and
// comes back, done or not, so that whoever waits can be interrupted.
#include "backward.hpp"
#include "forward.hpp"
#include "spec.hpp"

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace skode {

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

template <class T, Activation A, int V> class Solve {
public:
  explicit Solve(const Spec &spec)
      : spec_(spec), method_(spec), controller_(spec),
        tape_(spec.record ? spec.rows : 0, nullptr), written_(tape_.size(), 0) {
    for (std::int64_t l = 0; l < spec.depth; ++l)
      layers_.emplace_back(int(spec.widths[l]), int(spec.widths[l + 1]),
                           static_cast<const T *>(spec.weights[l]),
                           static_cast<const T *>(spec.biases[l]),
                           static_cast<const T *>(spec.shifts[l]));
    for (std::int64_t n = 0; n < spec.threads; ++n)
      forward_.push_back(std::make_unique<Forward<T, A, V>>(
          spec_, method_, controller_, layers_, begin(n), begin(n + 1), tape_.data(),
          written_.data()));
    finished_.assign(forward_.size(), 0);
  }

  int forward(double seconds) { return share(forward_, finished_, seconds); }

  void begin_backward(const Cotangents &cotangents) {
    cotangents_ = cotangents;
    backward_.clear();
    for (std::int64_t n = 0; n < spec_.threads; ++n)
      backward_.push_back(std::make_unique<Backward<T, A, V>>(
          spec_, cotangents_, method_, layers_, begin(n), begin(n + 1), tape_.data(),
          written_.data()));
    finished_.assign(backward_.size(), 0);
  }

  int backward(double seconds) {
    const int progress = share(backward_, finished_, seconds);
    if (progress == DONE && cotangents_.weights != nullptr)
      for (const auto &worker : backward_)
        for (std::size_t l = 0; l < layers_.size(); ++l)
          worker->field().gradients(int(l), static_cast<T *>(cotangents_.weights[l]),
                                    static_cast<T *>(cotangents_.biases[l]),
                                    static_cast<T *>(cotangents_.shifts[l]));
    if (progress == DONE)
      backward_.clear();
    return progress;
  }

private:
  const Spec spec_;
  const Method<T> method_;
  const Controller<T> controller_;
  Layers<T> layers_;
  std::vector<Taken *> tape_;
  std::vector<std::int64_t> written_;
  Cotangents cotangents_{};
  std::vector<std::unique_ptr<Forward<T, A, V>>> forward_; // they own the tape
  std::vector<std::unique_ptr<Backward<T, A, V>>> backward_;
  std::vector<char> finished_;

  std::int64_t begin(std::int64_t n) const { return n * spec_.rows / spec_.threads; }
};

} // namespace skode

using Compiled = skode::Solve<SKODE_REAL, skode::SKODE_ACTIVATION, 2>;

extern "C" {

// How many rows a tile takes.
int skode_tile() { return 2 * skode::lanes<SKODE_REAL>; }

void *skode_begin(const skode::Spec *spec) {
  try {
    return new Compiled(*spec);
  } catch (...) {
    return nullptr;
  }
}

int skode_forward(void *solve, double seconds) {
  return static_cast<Compiled *>(solve)->forward(seconds);
}

int skode_begin_backward(void *solve, const skode::Cotangents *cotangents) {
  try {
    static_cast<Compiled *>(solve)->begin_backward(*cotangents);
    return skode::DONE;
  } catch (...) {
    return skode::OUT_OF_MEMORY;
  }
}

int skode_backward(void *solve, double seconds) {
  return static_cast<Compiled *>(solve)->backward(seconds);
}

void skode_end(void *solve) { delete static_cast<Compiled *>(solve); }
}
