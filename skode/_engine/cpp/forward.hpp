// The forward solve of a range of rows, a tile of L lanes at a time.
//
// Each lane carries one row with its own time, step and acceptance. A lane whose row has
// ended takes the next row that waits, so that no lane idles while there are rows. The
// rules are those of loop.py, which is the twin to compare with.
#pragma once

#include "memory.hpp"
#include "method.hpp"
#include "perceptron.hpp"
#include "spec.hpp"
#include "threads.hpp"

#include <cmath>
#include <vector>

namespace skode {

enum Status { SUCCESS, MAX_STEPS, STEP_UNDERFLOW, NON_FINITE };

// A step that was taken: t, h and, behind it, the state before.
struct Taken {
  Taken *before;
  double t, h;
};

template <class T> T *state_of(Taken *taken) { return reinterpret_cast<T *>(taken + 1); }

template <class T> bool finite(const T *y, std::size_t stride, int count) {
  T sum = 0;
  for (int d = 0; d < count; ++d)
    sum += y[d * stride] * T(0);
  return sum == T(0);
}

template <class Field> class Forward {
public:
  using T = typename Field::T;
  static constexpr int V = Field::V, L = V * lanes<T>;

  Forward(const Spec &spec, const Method<T> &method, const Controller<T> &controller,
          const Network<T> &network, std::int64_t first, std::int64_t last,
          Taken **tape, std::int64_t *written)
      : spec_(spec), method_(method), controller_(controller),
        field_(network, 0, int(spec.state)), dim_(int(spec.state)), stages_(method.stages), next_(first), last_(last),
        tape_(tape), written_(written), arena_(sizeof(Taken) + sizeof(T) * dim_), y_(tile()),
        state_(tile()), after_(tile()), wait_y_(tile()), wait_slope_(tile()),
        slopes_(std::size_t(stages_ + 1) * dim_ * V) {
    for (int l = 0; l < L; ++l)
      row_[l] = -1;
  }

  // Step until all rows have ended (true) or until time is up.
  bool run(Clock::time_point until) {
    for (unsigned n = 1; fill(); ++n) {
      attempt();
      if (n % 16 == 0 && Clock::now() > until)
        return false;
    }
    return true;
  }

private:
  const Spec &spec_;
  const Method<T> &method_;
  const Controller<T> &controller_;
  Field field_;
  const int dim_, stages_;
  std::int64_t next_, last_;
  Taken **tape_; // the last step of each row, if steps are kept,
  std::int64_t *written_; // and the requested time behind the last one that they met
  Arena arena_;
  // The tile.
  std::int64_t row_[L];
  double t_[L], t1_[L], sign_[L], left_[L], h_[L], memory_[L];
  double start_[L], whole_[L];           // fixed steps: t0, length
  std::int64_t steps_[L];                // fixed steps: how many
  std::int64_t attempts_[L], rejected_[L];
  std::int64_t due_[L], stop_[L];        // requested times inside: next, end
  Array<Vec<T>> y_, state_, after_;      // before the step, in a stage, after the step
  // Rows that wait, their slopes and first steps known.
  std::int64_t wait_row_[L];
  double wait_h_[L];
  int waiting_ = 0, taken_ = 0;
  Array<Vec<T>> wait_y_, wait_slope_;
  Array<Vec<T>> slopes_; // (S + 1, D, V)

  Array<Vec<T>> tile() const { return Array<Vec<T>>(std::size_t(dim_) * V); }
  Vec<T> *slope(int s) { return slopes_.data() + std::size_t(s) * dim_ * V; }
  static T *scalars(Vec<T> *x) { return reinterpret_cast<T *>(x); }
  double time(std::int64_t row, std::int64_t i) const {
    return spec_.t[row * spec_.time_stride_row + i * spec_.time_stride];
  }
  T *output(std::int64_t row, std::int64_t i) const {
    return static_cast<T *>(spec_.ys) + (row * spec_.times + i) * dim_;
  }

  // Give every idle lane a row; return whether any lane has one.
  bool fill() {
    bool any = false;
    for (int l = 0; l < L; ++l) {
      while (row_[l] < 0 && (taken_ < waiting_ || admit()))
        take(l, taken_++);
      any = any || row_[l] >= 0;
    }
    return any;
  }

  // Prepare the next rows; return whether any of them has a way to go.
  bool admit() {
    waiting_ = taken_ = 0;
    const T *y0 = static_cast<const T *>(spec_.y0);
    T *y = scalars(wait_y_.data());
    while (next_ < last_ && waiting_ < L) {
      const std::int64_t row = next_++;
      const T *start = y0 + row * dim_;
      if (time(row, 0) == time(row, spec_.times - 1)) {
        stay(row, start);
        continue;
      }
      for (int d = 0; d < dim_; ++d)
        y[d * L + waiting_] = start[d];
      wait_row_[waiting_++] = row;
    }
    if (waiting_ == 0)
      return false;
    for (int l = waiting_; l < L; ++l)
      for (int d = 0; d < dim_; ++d)
        y[d * L + l] = T(0);
    alignas(64) T at[L] = {};
    for (int l = 0; l < waiting_; ++l)
      at[l] = T(time(wait_row_[l], 0));
    field_.evaluate(vectors(at), wait_y_.data(), wait_slope_.data());
    if (method_.adaptive)
      first_steps();
    return true;
  }

  // Hairer's first step, as control.PIController.first.
  void first_steps() {
    alignas(64) T at[L] = {}, by[L] = {};
    double speed[L], probe[L], span[L];
    const T *y = scalars(wait_y_.data()), *slope = scalars(wait_slope_.data());
    for (int l = 0; l < waiting_; ++l) {
      const double t0 = time(wait_row_[l], 0);
      span[l] = time(wait_row_[l], spec_.times - 1) - t0;
      double size = 0;
      speed[l] = 0;
      for (int d = 0; d < dim_; ++d) {
        const T scale = scale_of(y[d * L + l]);
        size += square(y[d * L + l] / scale);
        speed[l] += square(slope[d * L + l] / scale);
      }
      speed[l] = std::sqrt(speed[l]);
      probe[l] = controller_.probe(std::sqrt(size), speed[l], span[l]);
      by[l] = T(std::copysign(probe[l], span[l]));
      at[l] = T(t0 + std::copysign(probe[l], span[l]));
    }
    for (int d = 0; d < dim_; ++d)
      for (int v = 0; v < V; ++v)
        state_[d * V + v] =
            wait_y_[d * V + v] + vectors(by)[v] * wait_slope_[d * V + v];
    field_.evaluate(vectors(at), state_.data(), after_.data());
    const T *there = scalars(after_.data());
    for (int l = 0; l < waiting_; ++l) {
      double change = 0;
      for (int d = 0; d < dim_; ++d)
        change += square((there[d * L + l] - slope[d * L + l]) / scale_of(y[d * L + l]));
      change = std::sqrt(change) / probe[l];
      wait_h_[l] = controller_.first(speed[l], change, span[l]);
    }
  }

  T scale_of(T y) const { return controller_.atol + controller_.rtol * std::fabs(y); }
  static double square(T x) { return double(x) * double(x); }
  static Vec<T> *vectors(T *x) { return reinterpret_cast<Vec<T> *>(x); }

  // A row that need not move.
  void stay(std::int64_t row, const T *y) {
    const bool lost = !finite(y, 1, dim_);
    spec_.status[row] = lost ? NON_FINITE : SUCCESS;
    spec_.reached[row] = time(row, spec_.times - 1);
    spec_.accepted[row] = spec_.rejected[row] = 0;
    spec_.nfe[row] = method_.adaptive ? 2 : 0;
    for (std::int64_t i = 0; i < spec_.times; ++i)
      for (int d = 0; d < dim_; ++d)
        output(row, i)[d] = lost ? std::numeric_limits<T>::quiet_NaN() : y[d];
  }

  // Lane l takes row number w of those that wait.
  void take(int l, int w) {
    const std::int64_t row = row_[l] = wait_row_[w];
    t_[l] = time(row, 0);
    t1_[l] = time(row, spec_.times - 1);
    const double span = t1_[l] - t_[l];
    sign_[l] = span > 0 ? 1.0 : -1.0;
    left_[l] = std::fabs(span);
    attempts_[l] = rejected_[l] = 0;
    memory_[l] = controller_.start_memory();
    if (method_.adaptive) {
      h_[l] = wait_h_[w];
    } else {
      // As in loop.march: rounding alone asks for no further step.
      const double count =
          std::ceil(left_[l] / spec_.step_size * (1.0 - 4.0 * spec_.resolution));
      const double steps = std::fmax(count, 1.0);
      start_[l] = t_[l];
      whole_[l] = span / steps;
      steps_[l] = std::int64_t(std::fmin(steps, double(spec_.max_steps) + 1.0));
    }
    T *y = scalars(y_.data()), *k = scalars(slope(0));
    const T *from = scalars(wait_y_.data()), *k0 = scalars(wait_slope_.data());
    for (int d = 0; d < dim_; ++d) {
      y[d * L + l] = from[d * L + w];
      k[d * L + l] = k0[d * L + w];
    }
    due_[l] = 0;
    stop_[l] = spec_.times;
    while (due_[l] < spec_.times && time(row, due_[l]) == t_[l])
      ++due_[l];
    while (stop_[l] > 0 && time(row, stop_[l] - 1) == t1_[l])
      --stop_[l];
    for (std::int64_t i = due_[l]; i < stop_[l]; ++i)
      for (int d = 0; d < dim_; ++d)
        output(row, i)[d] = std::numeric_limits<T>::quiet_NaN();
  }

  // One step of every lane; lanes without a row take a step of length 0.
  void attempt() {
    alignas(64) T at[(MOST_STAGES + 1) * L], by[L];
    double size[L];
    bool last[L];
    for (int l = 0; l < L; ++l)
      propose(l, size[l], last[l]);
    for (int l = 0; l < L; ++l)
      by[l] = T(size[l] * sign_[l]);
    for (int s = 0; s <= stages_; ++s)
      for (int l = 0; l < L; ++l)
        at[s * L + l] = T(t_[l] + method_.c[s] * (size[l] * sign_[l]));
    const Vec<T> *h = vectors(by);
    for (int s = 1; s < stages_; ++s) {
      combine(&method_.a[s * stages_], s, h, state_.data());
      field_.evaluate(vectors(at + s * L), state_.data(), slope(s));
    }
    combine(method_.b.data(), stages_, h, after_.data());
    if (slope_is_wanted(last))
      field_.evaluate(vectors(at + stages_ * L), after_.data(), slope(stages_));

    alignas(64) T ratio[L];
    if (method_.adaptive)
      ratios(h, vectors(ratio));
    bool moved[L], any = false;
    for (int l = 0; l < L; ++l) {
      moved[l] = row_[l] >= 0 && decide(l, double(ratio[l]), size[l]);
      any = any || moved[l];
    }
    if (any)
      move(moved, size, last);
    for (int l = 0; l < L; ++l)
      if (row_[l] >= 0)
        end(l, moved[l], after_status(l, moved[l]));
  }

  void propose(int l, double &size, bool &last) const {
    size = 0.0;
    last = false;
    if (row_[l] < 0)
      return;
    if (!method_.adaptive) {
      size = std::fabs(whole_[l]);
      last = attempts_[l] + 1 >= steps_[l] && steps_[l] <= spec_.max_steps;
      return;
    }
    // Two equal steps at the end rather than a long one and a sliver.
    last = h_[l] * 1.01 >= left_[l];
    size = last ? left_[l] : std::fmin(h_[l], 0.5 * left_[l]);
  }

  // Whether anything reads the slope at the end of the step.
  bool slope_is_wanted(const bool *last) const {
    if (method_.adaptive)
      return true;
    for (int l = 0; l < L; ++l)
      if (row_[l] >= 0 && (!last[l] || due_[l] < stop_[l]))
        return true;
    return false;
  }

  // y + h sum_j weights_j k_j over the first stages.
  void combine(const T *weights, int count, const Vec<T> *h, Vec<T> *out) {
    const std::size_t stride = std::size_t(dim_) * V;
    for (int d = 0; d < dim_; ++d)
      for (int v = 0; v < V; ++v) {
        const std::size_t i = std::size_t(d) * V + v;
        const Vec<T> *k = slopes_.data() + i;
        Vec<T> sum = weights[0] * k[0];
        for (int s = 1; s < count; ++s)
          sum += weights[s] * k[s * stride];
        out[i] = y_[i] + h[v] * sum;
      }
  }

  // The error of each lane in units of the tolerance.
  void ratios(const Vec<T> *h, Vec<T> *out) {
    const std::size_t stride = std::size_t(dim_) * V;
    Vec<T> squares[V] = {};
    for (int d = 0; d < dim_; ++d)
      for (int v = 0; v < V; ++v) {
        const std::size_t i = std::size_t(d) * V + v;
        const Vec<T> *k = slopes_.data() + i;
        Vec<T> sum = method_.b_err[0] * k[0];
        for (int s = 1; s <= stages_; ++s)
          sum += method_.b_err[s] * k[s * stride];
        const Vec<T> scale =
            controller_.atol + controller_.rtol * larger<T>(magnitude<T>(y_[i]),
                                                            magnitude<T>(after_[i]));
        const Vec<T> share = h[v] * sum / scale;
        squares[v] += share * share;
      }
    for (int v = 0; v < V; ++v)
      for (int w = 0; w < lanes<T>; ++w)
        out[v][w] = std::sqrt(squares[v][w]);
  }

  // Whether lane l takes the step, and its next proposal.
  bool decide(int l, double ratio, double size) {
    ++attempts_[l];
    if (!method_.adaptive)
      return true;
    const bool accept = ratio <= 1.0;
    h_[l] = size * controller_.factor(ratio, memory_[l]);
    rejected_[l] += !accept;
    return accept;
  }

  void move(const bool *moved, const double *size, const bool *last) {
    for (int l = 0; l < L; ++l) {
      if (!moved[l])
        continue;
      const double h = size[l] * sign_[l];
      double t_next;
      if (method_.adaptive) {
        left_[l] -= size[l];
        t_next = t1_[l] - sign_[l] * left_[l];
      } else {
        t_next = last[l] ? t1_[l] : start_[l] + whole_[l] * double(attempts_[l]);
        left_[l] = last[l] ? 0.0 : left_[l];
      }
      const std::int64_t row = row_[l];
      while (due_[l] < stop_[l] && time(row, due_[l]) * sign_[l] <= t_next * sign_[l])
        write(l, due_[l]++, t_[l], h);
      if (spec_.record)
        keep(l, h);
      t_[l] = t_next;
    }
    alignas(64) T chosen[L];
    for (int l = 0; l < L; ++l)
      chosen[l] = T(moved[l]);
    Vec<T> *k = slope(0), *k_last = slope(stages_);
    for (int d = 0; d < dim_; ++d)
      for (int v = 0; v < V; ++v) {
        const std::size_t i = std::size_t(d) * V + v;
        const auto take = vectors(chosen)[v] != T(0);
        y_[i] = take ? after_[i] : y_[i];
        k[i] = take ? k_last[i] : k[i];
      }
  }

  // The state at a requested time inside the step.
  void write(int l, std::int64_t i, double t, double h) {
    double weights[MOST_STAGES + 1];
    method_.weights((time(row_[l], i) - t) / h, weights);
    T *out = output(row_[l], i);
    const T *y = scalars(y_.data());
    for (int d = 0; d < dim_; ++d) {
      T sum = 0;
      for (int s = 0; s <= stages_; ++s)
        sum += T(weights[s]) * scalars(slope(s))[d * L + l];
      out[d] = y[d * L + l] + T(h) * sum;
    }
  }

  void keep(int l, double h) {
    Taken *taken = static_cast<Taken *>(arena_.take());
    taken->before = tape_[row_[l]];
    taken->t = t_[l];
    taken->h = h;
    const T *y = scalars(y_.data());
    for (int d = 0; d < dim_; ++d)
      state_of<T>(taken)[d] = y[d * L + l];
    tape_[row_[l]] = taken;
  }

  // -1 where the row goes on.
  int after_status(int l, bool moved) {
    if (!method_.adaptive && !finite(scalars(y_.data()) + l, L, dim_))
      return NON_FINITE;
    if (moved && left_[l] <= 0.0)
      return finite(scalars(y_.data()) + l, L, dim_) ? SUCCESS : NON_FINITE;
    if (!moved && h_[l] <= 16.0 * spec_.resolution *
                               std::fmax(std::fabs(t_[l]), std::fabs(t1_[l])))
      return finite_slopes(l) ? STEP_UNDERFLOW : NON_FINITE;
    return attempts_[l] >= spec_.max_steps ? int(MAX_STEPS) : -1;
  }

  bool finite_slopes(int l) {
    return finite(scalars(slopes_.data()) + l, L, dim_ * (stages_ + 1)) &&
           finite(scalars(after_.data()) + l, L, dim_);
  }

  void end(int l, bool moved, int status) {
    if (status < 0)
      return;
    const std::int64_t row = row_[l];
    const bool lost = !finite(scalars(y_.data()) + l, L, dim_);
    double reached = t_[l];
    if (!method_.adaptive && lost && moved)
      reached = start_[l] + whole_[l] * double(attempts_[l] - 1);
    spec_.status[row] = status;
    spec_.reached[row] = reached;
    spec_.accepted[row] = attempts_[l] - rejected_[l];
    spec_.rejected[row] = rejected_[l];
    // The end of an even march is evaluated only for a time inside its last step.
    const bool unread = status == SUCCESS && first_inside(row) == stop_[l];
    spec_.nfe[row] = attempts_[l] * stages_ + (method_.adaptive ? 2 : unread ? 0 : 1);
    const T *y = scalars(y_.data()), *y0 = static_cast<const T *>(spec_.y0) + row * dim_;
    const T nan = std::numeric_limits<T>::quiet_NaN();
    for (std::int64_t i = stop_[l]; i < spec_.times; ++i)
      for (int d = 0; d < dim_; ++d)
        output(row, i)[d] = status == SUCCESS ? y[d * L + l] : nan;
    const std::int64_t first = first_inside(row);
    for (std::int64_t i = 0; i < first; ++i)
      std::copy(y0, y0 + dim_, output(row, i));
    if (spec_.record) {
      written_[row] = due_[l];
      if (lost)
        forget(row, sign_[l]);
    }
    row_[l] = -1;
    // What is left in the lane must not overflow in steps of length 0.
    T *rest = scalars(y_.data()), *k = scalars(slope(0));
    for (int d = 0; d < dim_; ++d)
      rest[d * L + l] = k[d * L + l] = T(0);
    t_[l] = 0.0;
  }

  std::int64_t first_inside(std::int64_t row) const {
    std::int64_t i = 0;
    while (i < spec_.times && time(row, i) == time(row, 0))
      ++i;
    return i;
  }

  // Drop the steps that led to, or began in, a state that is not finite: tape._sound.
  void forget(std::int64_t row, double sign) {
    Taken *&taken = tape_[row];
    bool sound = false;
    while (taken != nullptr && !sound) {
      sound = finite(state_of<T>(taken), 1, dim_);
      std::int64_t &met = written_[row];
      while (met > 0 && time(row, met - 1) * sign > taken->t * sign)
        --met;
      taken = taken->before;
    }
  }
};

} // namespace skode
