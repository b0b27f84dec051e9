// A Runge-Kutta method and its step-size control, in the type of the state.
#pragma once

#include "spec.hpp"
#include "vector.hpp"

#include <cmath>
#include <limits>
#include <vector>

namespace skode {

constexpr int MOST_STAGES = 16;

template <class T> struct Method {
  int stages, order, powers;
  bool adaptive;
  std::vector<T> a, b, b_err;
  std::vector<double> c, dense;

  explicit Method(const MethodSpec &spec)
      : stages(int(spec.stages)), order(int(spec.order)), powers(int(spec.powers)),
        adaptive(spec.b_err != nullptr), a(spec.a, spec.a + stages * stages),
        b(spec.b, spec.b + stages), c(spec.c, spec.c + stages + 1),
        dense(spec.dense, spec.dense + powers * (stages + 1)) {
    if (adaptive)
      b_err.assign(spec.b_err, spec.b_err + stages + 1);
  }

  // The S + 1 weights of y(t + theta h).
  void weights(double theta, double *out) const {
    for (int s = 0; s <= stages; ++s)
      out[s] = 0.0;
    double power = 1.0;
    for (int p = 0; p < powers; ++p) {
      power *= theta;
      for (int s = 0; s <= stages; ++s)
        out[s] += power * dense[p * (stages + 1) + s];
    }
  }

  // Their derivatives by theta.
  void slopes(double theta, double *out) const {
    for (int s = 0; s <= stages; ++s)
      out[s] = 0.0;
    double power = 1.0;
    for (int p = 0; p < powers; ++p) {
      for (int s = 0; s <= stages; ++s)
        out[s] += (p + 1) * power * dense[p * (stages + 1) + s];
      power *= theta;
    }
  }
};

// Proportional-integral control, as control.PIController: formulas and names are its.
template <class T> class Controller {
public:
  static constexpr double beta = 0.04, safety = 0.9, shrink = 0.2, grow = 10.0;
  T rtol, atol;

  explicit Controller(const Spec &spec) : order_(double(spec.method.order)) {
    const double root = std::sqrt(double(spec.state));
    rtol = T(spec.rtol * root);
    atol = T(std::fmax(spec.atol * root, double(std::numeric_limits<T>::min())));
    const double finest = std::fmax(spec.rtol, spec.atol);
    noise_ = std::fmin(1e-2, 16.0 * std::numeric_limits<T>::epsilon() / finest);
    constant_ = safety / std::pow(spec.method.error_constant, 1.0 / order_);
  }

  // `size` and `speed`: norms of the state and of its slope; `change`: of the slope's
  // change over the probe, by its length.
  double probe(double size, double speed, double span) const {
    return std::fmin((size + 1.0) / std::fmax(speed, 1e-30) * 0.01, nearest(span));
  }

  double first(double speed, double change, double span) const {
    const double near = nearest(span);
    speed = std::fmax(speed, 1e-30);
    // NaN must pass: std::fmin would drop it.
    const double ratio = speed / change;
    const double wavelength = ratio > near ? near : ratio;
    const double step =
        std::pow(speed * wavelength, -1.0 / order_) * wavelength * constant_;
    return std::fmax(step, near * 1e-6); // a number wins over NaN
  }

  static double start_memory() { return std::log(1e-4); }

  // The next step over this one; `memory`, a logarithm, becomes the next memory.
  double factor(double ratio, double &memory) const {
    if (!std::isfinite(ratio)) {
      memory = 0.0;
      return shrink;
    }
    const double log_ratio = std::log(std::fmax(ratio, noise_));
    const double factor =
        safety * std::exp(beta * memory + (0.75 * beta - 1.0 / order_) * log_ratio);
    memory = std::fmin(std::fmax(log_ratio, start_memory()), 0.0);
    return std::fmin(std::fmax(factor, shrink), grow);
  }

private:
  double order_, noise_, constant_;

  static double nearest(double span) {
    return std::fmax(std::fabs(span), double(std::numeric_limits<T>::min()));
  }
};

} // namespace skode
