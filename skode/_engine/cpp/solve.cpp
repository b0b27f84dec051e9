// The doors: one solve, its gradient, its end. Compiled where it runs, for one type
// (SKODE_REAL) and one activation (SKODE_ACTIVATION); see build.py. flow.cpp includes all
// of this for a field of its own.
//
// Rows are shared out among threads in even ranges. A call works for some seconds and
// comes back, done or not, so that whoever waits can be interrupted.
#include "backward.hpp"
#include "forward.hpp"
#include "spec.hpp"
#include "threads.hpp"

#include <memory>
#include <vector>

namespace skode {

template <class Field> class Solve {
  using T = typename Field::T;

public:
  explicit Solve(const Spec &spec)
      : spec_(spec), method_(spec.method), controller_(spec),
        network_(spec.network),
        tape_(spec.record ? spec.rows : 0, nullptr), written_(tape_.size(), 0) {
    for (std::int64_t n = 0; n < spec.threads; ++n)
      forward_.push_back(std::make_unique<Forward<Field>>(
          spec_, method_, controller_, network_, begin(n), begin(n + 1), tape_.data(),
          written_.data()));
    finished_.assign(forward_.size(), 0);
  }

  int forward(double seconds) { return share(forward_, finished_, seconds); }

  void begin_backward(const Cotangents &cotangents) {
    cotangents_ = cotangents;
    backward_.clear();
    for (std::int64_t n = 0; n < spec_.threads; ++n)
      backward_.push_back(std::make_unique<Backward<Field>>(
          spec_, cotangents_, method_, network_, begin(n), begin(n + 1), tape_.data(),
          written_.data()));
    finished_.assign(backward_.size(), 0);
  }

  int backward(double seconds) {
    const int progress = share(backward_, finished_, seconds);
    if (progress == DONE && cotangents_.gradients.weights != nullptr)
      for (const auto &worker : backward_)
        worker->field().gradients(cotangents_.gradients);
    if (progress == DONE)
      backward_.clear();
    return progress;
  }

private:
  const Spec spec_;
  const Method<T> method_;
  const Controller<T> controller_;
  const Network<T> network_;
  std::vector<Taken *> tape_;
  std::vector<std::int64_t> written_;
  Cotangents cotangents_{};
  std::vector<std::unique_ptr<Forward<Field>>> forward_; // they own the tape
  std::vector<std::unique_ptr<Backward<Field>>> backward_;
  std::vector<char> finished_;

  std::int64_t begin(std::int64_t n) const { return n * spec_.rows / spec_.threads; }
};

} // namespace skode

#ifndef SKODE_FIELD
#define SKODE_FIELD Perceptron
#endif
using Field = skode::SKODE_FIELD<SKODE_REAL, skode::SKODE_ACTIVATION, 2>;
using Compiled = skode::Solve<Field>;

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
