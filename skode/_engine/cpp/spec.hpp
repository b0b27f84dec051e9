// What Python passes: plain structures, laid out as ctypes lays out its own.
// B rows, T times, D state, S stages, P powers of theta. T-typed memory is `void`.
#pragma once

#include <cstdint>

namespace skode {

// The field: layer l has widths[l] inputs and widths[l + 1] outputs.
struct NetworkSpec {
  const void *const *weights, *const *biases, *const *shifts;
  const std::int64_t *widths;
  std::int64_t depth;
  // A flow's: M (outputs, inputs) of its trace, and whether it has an energy; else 0.
  const void *trace;
  std::int64_t trace_outputs, trace_inputs, energy;
};

// a (S, S), b (S), b_err (S + 1) or null, c (S + 1), dense (P, S + 1).
struct MethodSpec {
  const double *a, *b, *b_err, *c, *dense;
  std::int64_t stages, order, powers;
  double error_constant;
};

// The gradient of the field's parameters.
struct Gradients {
  void *const *weights, *const *biases, *const *shifts; // or null
  void *trace;                                          // or null
};

struct Spec {
  NetworkSpec network;
  MethodSpec method;
  // The tolerance. `resolution` is the epsilon of the times' own type.
  double rtol, atol, step_size, resolution;
  std::int64_t max_steps;
  // The batch: y0 (B, D), times (B, T) by strides, ys (B, T, D), the others (B,).
  std::int64_t rows, times, state, time_stride_row, time_stride;
  const void *y0;
  const double *t;
  void *ys;
  double *reached;
  std::int64_t *status, *accepted, *rejected, *nfe;
  // Whether steps are kept for a gradient, and how many threads share the rows.
  std::int64_t record, threads;
};

struct Cotangents {
  const void *grad_ys; // (B, T, D)
  void *grad_y0;       // (B, D)
  double *grad_t;      // (B, T), or null
  const double *t;     // as in Spec
  std::int64_t time_stride_row, time_stride;
  Gradients gradients;
};

// A march along knots that all rows share: see march.hpp.
struct MarchSpec {
  NetworkSpec network;
  MethodSpec method;
  std::int64_t rows, state, steps, controlled, threads;
  const double *knots; // (steps + 1,)
  const void *y0;      // (B, D)
  void *y1, *error;    // (B, D), (B,)
  void *tape;          // (tiles, steps, 2, D, V * lanes), or null
};

struct MarchCotangents {
  const void *grad_y1, *grad_error; // (B, D), (B,)
  void *grad_y0;                    // (B, D)
  Gradients gradients;
};

} // namespace skode
