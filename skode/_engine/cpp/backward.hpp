// The gradient of a range of rows, a tile of L lanes at a time.
//
// Each lane replays the steps of one row from the last to the first, with the recurrence
// at the head of checkpoint.py, which is the twin to compare with.
#pragma once

#include "forward.hpp"
#include "memory.hpp"
#include "method.hpp"
#include "perceptron.hpp"
#include "spec.hpp"

#include <vector>

namespace skode {

template <class Field> class Backward {
public:
  using T = typename Field::T;
  static constexpr int V = Field::V, L = V * lanes<T>;

  Backward(const Spec &spec, const Cotangents &cotangents, const Method<T> &method,
           const Network<T> &network, std::int64_t first, std::int64_t last,
           Taken *const *tape, const std::int64_t *written)
      : spec_(spec), given_(cotangents), method_(method),
        
        field_(network, method.stages + 1, int(spec.state)), dim_(int(spec.state)),
        stages_(method.stages), next_(first), last_(last), tape_(tape), written_(written), y_(tile()),
        u_(tile()), direct_(tile()), slopes_(std::size_t(stages_ + 1) * dim_ * V),
        pulls_(std::size_t(stages_ + 1) * dim_ * V),
        extra_(std::size_t(stages_ + 1) * dim_ * V) {
    for (int l = 0; l < L; ++l)
      row_[l] = -1;
  }

  // Replay until all rows are done (true) or until time is up.
  bool run(Clock::time_point until) {
    for (unsigned n = 1; fill(); ++n) {
      step();
      if (n % 16 == 0 && Clock::now() > until)
        return false;
    }
    return true;
  }

  const Field &field() const { return field_; }

private:
  const Spec &spec_;
  const Cotangents &given_;
  const Method<T> &method_;
  Field field_;
  const int dim_, stages_;
  std::int64_t next_, last_;
  Taken *const *tape_;
  const std::int64_t *written_;
  std::int64_t row_[L];
  Taken *taken_[L];
  std::int64_t inside_[L]; // requested times inside, not yet met: all before this one
  Array<Vec<T>> y_, u_;    // state before the step; cotangent of the state
  Array<Vec<T>> direct_;   // what events add to u
  Array<Vec<T>> slopes_, pulls_, extra_; // (S + 1, D, V): k, l, and what events add to v

  Array<Vec<T>> tile() const { return Array<Vec<T>>(std::size_t(dim_) * V); }
  std::size_t stride() const { return std::size_t(dim_) * V; }
  static T *scalars(Vec<T> *x) { return reinterpret_cast<T *>(x); }
  static Vec<T> *vectors(T *x) { return reinterpret_cast<Vec<T> *>(x); }
  double time(std::int64_t row, std::int64_t i) const {
    return given_.t[row * given_.time_stride_row + i * given_.time_stride];
  }
  double first_time(std::int64_t row) const { return time(row, 0); }
  double last_time(std::int64_t row) const { return time(row, spec_.times - 1); }
  const T *grad(std::int64_t row, std::int64_t i) const {
    return static_cast<const T *>(given_.grad_ys) + (row * spec_.times + i) * dim_;
  }
  double *grad_t(std::int64_t row) const { return given_.grad_t + row * spec_.times; }

  bool fill() {
    bool any = false;
    for (int l = 0; l < L; ++l) {
      while (row_[l] < 0 && next_ < last_)
        take(l, next_++);
      any = any || row_[l] >= 0;
    }
    return any;
  }

  void take(int l, std::int64_t row) {
    row_[l] = row;
    taken_[l] = tape_[row];
    T *u = scalars(u_.data());
    std::int64_t end = spec_.times;
    while (end > 0 && time(row, end - 1) == last_time(row))
      --end;
    inside_[l] = std::min(end, written_[row]); // a row that failed met no more
    for (int d = 0; d < dim_; ++d) {
      T sum = 0;
      for (std::int64_t i = end; i < spec_.times; ++i)
        sum += grad(row, i)[d];
      u[d * L + l] = sum;
    }
    if (taken_[l] == nullptr)
      leave(l);
  }

  // The row has come back to its start.
  void leave(int l) {
    const std::int64_t row = row_[l];
    T *u = scalars(u_.data()), *y = scalars(y_.data());
    T *out = static_cast<T *>(given_.grad_y0) + row * dim_;
    const bool moves = first_time(row) != last_time(row);
    for (int d = 0; d < dim_; ++d) {
      T sum = u[d * L + l];
      for (std::int64_t i = 0; moves && i < spec_.times && starts(row, i); ++i)
        sum += grad(row, i)[d];
      out[d] = sum;
      u[d * L + l] = y[d * L + l] = T(0);
    }
    row_[l] = -1;
  }

  bool starts(std::int64_t row, std::int64_t i) const {
    return time(row, i) == first_time(row);
  }

  // Whether requested time i of the lane lies inside its step.
  bool is_inside(int l, std::int64_t i) const {
    const std::int64_t row = row_[l];
    const double sign = taken_[l]->h > 0 ? 1.0 : -1.0;
    return i >= 0 && !starts(row, i) && time(row, i) * sign > taken_[l]->t * sign;
  }

  void step() {
    alignas(64) T at[(MOST_STAGES + 1) * L] = {}, by[L] = {};
    bool events = false, busy[L] = {};
    T *y = scalars(y_.data());
    for (int l = 0; l < L; ++l) {
      if (row_[l] < 0)
        continue;
      const T *from = state_of<T>(taken_[l]);
      for (int d = 0; d < dim_; ++d)
        y[d * L + l] = from[d];
      by[l] = T(taken_[l]->h);
      for (int s = 0; s <= stages_; ++s)
        at[s * L + l] = T(taken_[l]->t + method_.c[s] * taken_[l]->h);
      busy[l] = is_inside(l, inside_[l] - 1);
      events = events || busy[l];
    }
    const Vec<T> *h = vectors(by), *times = vectors(at);
    const int used = events ? stages_ + 1 : stages_;
    replay(h, times, busy, used);
    if (events)
      gather(by);
    for (int s = used - 1; s >= 0; --s)
      pull(s, h, events);
    for (std::size_t i = 0; i < stride(); ++i) {
      for (int s = 0; s < stages_; ++s)
        u_[i] += pulls_[s * stride() + i];
      if (events)
        u_[i] += direct_[i];
    }
    if (given_.grad_t != nullptr)
      time_gradients(used);
    if (given_.gradients.weights != nullptr)
      field_.accumulate(used, times);
    for (int l = 0; l < L; ++l)
      if (row_[l] >= 0)
        go_back(l);
  }

  // Evaluate the stages, and f(t + h, y1) where a time inside reads it.
  void replay(const Vec<T> *h, const Vec<T> *times, const bool *busy, int used) {
    for (int s = 0; s < used; ++s) {
      const bool end = s == stages_;
      const T *weights = end ? method_.b.data() : &method_.a[s * stages_];
      Vec<T> *state = field_.input(s);
      for (int d = 0; d < dim_; ++d)
        for (int v = 0; v < V; ++v) {
          const std::size_t i = std::size_t(d) * V + v;
          Vec<T> sum = {};
          for (int j = 0; j < s; ++j)
            sum += weights[j] * slopes_[j * stride() + i];
          state[i] = y_[i] + h[v] * sum;
        }
      if (end)
        for (int l = 0; l < L; ++l)
          for (int d = 0; !busy[l] && d < dim_; ++d)
            scalars(state)[d * L + l] = T(0); // f may not be finite there
      field_.linearize(s, times + s * V, slopes_.data() + s * stride());
    }
  }

  // Spread the gradients of the times inside over the v, and over the state before.
  void gather(const T *by) {
    std::fill(extra_.data(), extra_.data() + (stages_ + 1) * stride(), Vec<T>{});
    std::fill(direct_.data(), direct_.data() + stride(), Vec<T>{});
    T *direct = scalars(direct_.data());
    double weights[MOST_STAGES + 1];
    for (int l = 0; l < L; ++l) {
      if (row_[l] < 0)
        continue;
      for (std::int64_t i = inside_[l] - 1; is_inside(l, i); --i) {
        const T *g = grad(row_[l], i);
        method_.weights((time(row_[l], i) - taken_[l]->t) / taken_[l]->h, weights);
        for (int d = 0; d < dim_; ++d)
          direct[d * L + l] += g[d];
        for (int s = 0; s <= stages_; ++s) {
          T *extra = scalars(extra_.data() + s * stride());
          for (int d = 0; d < dim_; ++d)
            extra[d * L + l] += T(weights[s]) * by[l] * g[d];
        }
      }
    }
  }

  // v_s and l_s; the slope at the end of the step is a function of y1, as u is.
  void pull(int s, const Vec<T> *h, bool events) {
    const bool end = s == stages_;
    Vec<T> *v_s = field_.cotangent(s), *l_s = pulls_.data() + s * stride();
    for (int d = 0; d < dim_; ++d)
      for (int v = 0; v < V; ++v) {
        const std::size_t i = std::size_t(d) * V + v;
        Vec<T> sum = {};
        if (!end) {
          sum = method_.b[s] * u_[i];
          for (int j = s + 1; j < stages_; ++j)
            sum += method_.a[j * stages_ + s] * pulls_[j * stride() + i];
          sum *= h[v];
        }
        v_s[i] = events ? sum + extra_[s * stride() + i] : sum;
      }
    field_.pull(s, l_s);
    if (end)
      for (std::size_t i = 0; i < stride(); ++i)
        u_[i] += l_s[i];
  }

  // A step is a fixed fraction of its row's span: see _Reverse._time_gradient.
  void time_gradients(int used) {
    double by_t[L] = {}, by_h[L] = {};
    for (int s = 0; s < used; ++s) {
      alignas(64) T moved[L];
      field_.pull_time(s, vectors(moved));
      const T *k = scalars(slopes_.data() + s * stride());
      const T *v = scalars(field_.cotangent(s));
      for (int l = 0; l < L; ++l) {
        if (row_[l] < 0)
          continue;
        double product = 0;
        for (int d = 0; d < dim_; ++d)
          product += double(k[d * L + l]) * double(v[d * L + l]);
        by_t[l] += moved[l];
        by_h[l] += method_.c[s] * moved[l] + product / taken_[l]->h;
      }
    }
    for (int l = 0; l < L; ++l) {
      if (row_[l] < 0)
        continue;
      const std::int64_t row = row_[l];
      const Taken &taken = *taken_[l];
      for (std::int64_t i = inside_[l] - 1; is_inside(l, i); --i) {
        const double theta = (time(row, i) - taken.t) / taken.h;
        const double speed = rate(l, i, theta);
        grad_t(row)[i] += speed;
        by_t[l] -= speed;
        by_h[l] -= speed * theta;
      }
      const double span = last_time(row) - first_time(row);
      const double before = (taken.t - first_time(row)) / span, share = taken.h / span;
      grad_t(row)[0] += (1 - before) * by_t[l] - share * by_h[l];
      grad_t(row)[spec_.times - 1] += before * by_t[l] + share * by_h[l];
    }
  }

  // The gradient of requested time i of the lane: that of its state, times its slope.
  double rate(int l, std::int64_t i, double theta) {
    double weights[MOST_STAGES + 1], sum = 0;
    method_.slopes(theta, weights);
    const T *g = grad(row_[l], i);
    for (int s = 0; s <= stages_; ++s) {
      const T *k = scalars(slopes_.data() + s * stride());
      for (int d = 0; d < dim_; ++d)
        sum += weights[s] * double(k[d * L + l]) * double(g[d]);
    }
    return sum;
  }

  void go_back(int l) {
    while (is_inside(l, inside_[l] - 1))
      --inside_[l];
    taken_[l] = taken_[l]->before;
    if (taken_[l] == nullptr)
      leave(l);
  }
};

} // namespace skode
