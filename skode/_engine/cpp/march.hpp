// A march along knots that all rows share, and its gradient, a tile of L rows at a time.
//
// Formulas and names are those of grid.py, which is the twin to compare with. The tape has
// the state and its slope at every knot but the last; the gradient computes the stages
// behind them again, one step at a time. The slope at the end of a step is the first one
// of the next: `carried` is its cotangent there.
#pragma once

#include "memory.hpp"
#include "method.hpp"
#include "network.hpp"
#include "spec.hpp"
#include "threads.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

namespace skode {

template <class Field> class March {
public:
  using T = typename Field::T;
  static constexpr int V = Field::V, L = V * lanes<T>;

  // `given` is null for a march without a gradient.
  March(const MarchSpec &spec, const Method<T> &method, const Network<T> &network,
        const MarchCotangents *given, std::int64_t first, std::int64_t last)
      : spec_(spec), method_(method), given_(given),
        field_(network, given == nullptr ? 0 : method.stages, int(spec.state)),
        dim_(int(spec.state)), stages_(method.stages), first_(first), last_(last),
        y_(tile(1)), state_(tile(1)), u_(tile(1)), carried_(tile(1)), error_(tile(1)),
        slopes_(tile(stages_ + 1)), pulls_(tile(stages_ + 1)) {}

  // All tiles from the first to the last; `until` is not looked at.
  bool run(Clock::time_point) {
    for (std::int64_t n = first_; n < last_; ++n)
      given_ == nullptr ? forward(n) : backward(n);
    return true;
  }

  const Field &field() const { return field_; }

private:
  const MarchSpec &spec_;
  const Method<T> &method_;
  const MarchCotangents *given_;
  Field field_;
  const int dim_, stages_;
  std::int64_t first_, last_;
  Array<Vec<T>> y_, state_, u_, carried_, error_;
  Array<Vec<T>> slopes_, pulls_; // (S + 1, D, V): k, l

  Array<Vec<T>> tile(int count) const {
    return Array<Vec<T>>(std::size_t(count) * dim_ * V);
  }
  std::size_t stride() const { return std::size_t(dim_) * V; }
  Vec<T> *slope(int s) { return slopes_.data() + s * stride(); }
  Vec<T> *pulled(int s) { return pulls_.data() + s * stride(); }
  double step(std::int64_t i) const { return spec_.knots[i + 1] - spec_.knots[i]; }

  // Times of all rows; the end of a step is the next knot.
  void at(std::int64_t i, int s, Vec<T> *time) const {
    const double t = s == stages_ ? spec_.knots[i + 1]
                                  : spec_.knots[i] + method_.c[s] * step(i);
    std::fill_n(time, V, splat<T>(T(t)));
  }

  // Rows of tile n, `width` numbers each, into lanes, or back.
  void load(std::int64_t n, const void *rows, int width, Vec<T> *into) const {
    std::fill_n(into, width * V, Vec<T>{});
    T *lane = reinterpret_cast<T *>(into);
    const T *from = static_cast<const T *>(rows) + n * L * width;
    for (int l = 0; l < held(n); ++l)
      for (int d = 0; d < width; ++d)
        lane[d * L + l] = from[l * width + d];
  }

  void store(std::int64_t n, const Vec<T> *from, int width, void *rows) const {
    const T *lane = reinterpret_cast<const T *>(from);
    T *into = static_cast<T *>(rows) + n * L * width;
    for (int l = 0; l < held(n); ++l)
      for (int d = 0; d < width; ++d)
        into[l * width + d] = lane[d * L + l];
  }

  int held(std::int64_t n) const {
    return int(std::min<std::int64_t>(L, spec_.rows - n * L));
  }

  // State and slope of a tile at a knot.
  char *tape(std::int64_t n, std::int64_t i) const {
    return static_cast<char *>(spec_.tape) +
           (n * spec_.steps + i) * 2 * stride() * sizeof(Vec<T>);
  }

  // y + h sum_j weights_j k_j over the first stages.
  void combine(const T *weights, int count, double h, Vec<T> *out) {
    for (std::size_t i = 0; i < stride(); ++i) {
      const Vec<T> *k = slopes_.data() + i;
      Vec<T> sum = {};
      for (int s = 0; s < count; ++s)
        sum += weights[s] * k[s * stride()];
      out[i] = y_[i] + T(h) * sum;
    }
  }

  // The embedded error e of a step, in the columns where it is measured.
  void embed(double h) {
    for (std::size_t i = 0; i < std::size_t(spec_.controlled) * V; ++i) {
      Vec<T> sum = {};
      for (int s = 0; s <= stages_; ++s)
        sum += method_.b_err[s] * slopes_[s * stride() + i];
      error_[i] = T(h) * sum;
    }
  }

  void forward(std::int64_t n) {
    Vec<T> time[V], squares[V] = {};
    load(n, spec_.y0, dim_, y_.data());
    at(0, 0, time);
    field_.evaluate(time, y_.data(), slope(0));
    for (std::int64_t i = 0; i < spec_.steps; ++i) {
      if (spec_.tape != nullptr) {
        std::memcpy(tape(n, i), y_.data(), stride() * sizeof(Vec<T>));
        std::memcpy(tape(n, i) + stride() * sizeof(Vec<T>), slope(0),
                    stride() * sizeof(Vec<T>));
      }
      const double h = step(i);
      for (int s = 1; s <= stages_; ++s) {
        const bool end = s == stages_;
        combine(end ? method_.b.data() : &method_.a[s * stages_], s, h, state_.data());
        at(i, s, time);
        field_.evaluate(time, state_.data(), slope(s));
      }
      embed(h);
      for (std::size_t d = 0; d < std::size_t(spec_.controlled) * V; ++d)
        squares[d % V] += error_[d] * error_[d];
      std::swap(y_, state_);
      std::copy_n(slope(stages_), stride(), slope(0));
    }
    store(n, y_.data(), dim_, spec_.y1);
    store(n, squares, 1, spec_.error);
  }

  void backward(std::int64_t n) {
    Vec<T> w[V], times[MOST_STAGES * V];
    load(n, given_->grad_y1, dim_, u_.data());
    load(n, given_->grad_error, 1, w);
    std::fill_n(carried_.data(), stride(), Vec<T>{});
    for (std::int64_t i = spec_.steps - 1; i >= 0; --i) {
      replay(n, i, times);
      embed(step(i));
      for (std::size_t d = 0; d < std::size_t(spec_.controlled) * V; ++d)
        error_[d] *= T(2) * w[d % V];
      pull(step(i));
      accumulate(stages_, times);
    }
    // The first slope of all, at the state that replay has left in y_.
    at(0, 0, times);
    std::copy_n(y_.data(), stride(), field_.input(0));
    field_.linearize(0, times, slope(0));
    std::copy_n(carried_.data(), stride(), field_.cotangent(0));
    field_.pull(0, pulled(0));
    for (std::size_t d = 0; d < stride(); ++d)
      u_[d] += pulled(0)[d];
    accumulate(1, times);
    store(n, u_.data(), dim_, given_->grad_y0);
  }

  // Stages of step i behind the first; slot s - 1 is that of stage s.
  void replay(std::int64_t n, std::int64_t i, Vec<T> *times) {
    std::memcpy(y_.data(), tape(n, i), stride() * sizeof(Vec<T>));
    std::memcpy(slope(0), tape(n, i) + stride() * sizeof(Vec<T>),
                stride() * sizeof(Vec<T>));
    for (int s = 1; s <= stages_; ++s) {
      const bool end = s == stages_;
      combine(end ? method_.b.data() : &method_.a[s * stages_], s, step(i),
              field_.input(s - 1));
      at(i, s, times + (s - 1) * V);
      field_.linearize(s - 1, times + (s - 1) * V, slope(s));
    }
  }

  // u and carried, from the end of the step to its start.
  void pull(double h) {
    for (int s = stages_; s >= 0; --s) {
      const bool end = s == stages_;
      Vec<T> *v_s = s == 0 ? carried_.data() : field_.cotangent(s - 1);
      for (std::size_t i = 0; i < stride(); ++i) {
        Vec<T> sum = {};
        if (!end)
          sum = method_.b[s] * u_[i];
        for (int j = s + 1; j < stages_; ++j)
          sum += method_.a[j * stages_ + s] * pulls_[j * stride() + i];
        if (i < std::size_t(spec_.controlled) * V)
          sum += method_.b_err[s] * error_[i];
        v_s[i] = T(h) * sum;
        if (end)
          v_s[i] += carried_[i];
      }
      if (s > 0)
        field_.pull(s - 1, pulled(s));
      for (std::size_t i = 0; end && i < stride(); ++i)
        u_[i] += pulled(s)[i];
    }
    for (int s = 1; s < stages_; ++s)
      for (std::size_t i = 0; i < stride(); ++i)
        u_[i] += pulled(s)[i];
  }

  void accumulate(int used, const Vec<T> *times) {
    if (given_->gradients.weights != nullptr)
      field_.accumulate(used, times);
  }
};

// Tiles are shared out among threads in even ranges.
template <class Field>
int march(const MarchSpec &spec, const MarchCotangents *given) {
  using T = typename Field::T;
  constexpr std::int64_t L = March<Field>::L;
  try {
    const Method<T> method(spec.method);
    const Network<T> network(spec.network);
    const std::int64_t tiles = (spec.rows + L - 1) / L;
    std::vector<std::unique_ptr<March<Field>>> workers;
    for (std::int64_t n = 0; n < spec.threads; ++n)
      workers.push_back(std::make_unique<March<Field>>(
          spec, method, network, given, n * tiles / spec.threads,
          (n + 1) * tiles / spec.threads));
    std::vector<char> finished(workers.size(), 0);
    const int progress = share(workers, finished, 0.0);
    if (progress == DONE && given != nullptr && given->gradients.weights != nullptr)
      for (const auto &worker : workers)
        worker->field().gradients(given->gradients);
    return progress;
  } catch (...) {
    return OUT_OF_MEMORY;
  }
}

} // namespace skode
