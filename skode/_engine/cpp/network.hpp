// The weights of a field, in the order in which they are read.
#pragma once

#include "spec.hpp"
#include "vector.hpp"

#include <algorithm>
#include <vector>

namespace skode {

// Outputs at a time: their sums fill half of the registers, or two thirds.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int BLOCK = 8;
#else
constexpr int BLOCK = 4;
#endif

// Where the sums of a product begin.
template <class T> constexpr auto nothing = [](int, int) { return Vec<T>{}; };

// A matrix (outputs, inputs), by blocks of outputs: the order in which it is read.
template <class T> class Matrix {
public:
  int outputs = 0, inputs = 0;

  // Entry (j, i) is given[j * by_output + i * by_input].
  Matrix(int outputs, int inputs, const T *given, std::size_t by_output,
         std::size_t by_input)
      : outputs(outputs), inputs(inputs) {
    data_.resize(std::size_t(outputs) * inputs);
    T *next = data_.data();
    int width = BLOCK;
    for (int first = 0; first < outputs; first += width) {
      while (first + width > outputs) // behind the last whole block
        width /= 2;
      for (int i = 0; i < inputs; ++i)
        for (int j = first; j < first + width; ++j)
          *next++ = given[j * by_output + i * by_input];
    }
  }

  // done(j, v, sum) for every output j of the product with x, sums begun by begin(j, v).
  template <int V, class Begin, class Done>
  void times(const Vec<T> *x, Begin begin, Done done) const {
    int first = 0;
    for (; first + BLOCK <= outputs; first += BLOCK)
      some<V, BLOCK>(x, first, begin, done);
    rest<V, BLOCK / 2>(x, first, begin, done);
  }

private:
  std::vector<T> data_;

  // Outputs behind the last whole block, in blocks of half the size.
  template <int V, int J, class Begin, class Done>
  void rest(const Vec<T> *x, int first, Begin begin, Done done) const {
    if (outputs - first >= J) {
      some<V, J>(x, first, begin, done);
      first += J;
    }
    if constexpr (J > 1)
      rest<V, J / 2>(x, first, begin, done);
  }

  template <int V, int J, class Begin, class Done>
  inline void some(const Vec<T> *x, int first, Begin begin, Done done) const {
    const T *weight = data_.data() + std::size_t(first) * inputs;
    Vec<T> sum[J][V];
    for (int j = 0; j < J; ++j)
      for (int v = 0; v < V; ++v)
        sum[j][v] = begin(first + j, v);
    for (int i = 0; i < inputs; ++i)
      for (int j = 0; j < J; ++j)
        for (int v = 0; v < V; ++v)
          sum[j][v] += weight[i * J + j] * x[i * V + v];
    for (int j = 0; j < J; ++j)
      for (int v = 0; v < V; ++v)
        done(first + j, v, sum[j][v]);
  }
};

template <class T> struct Layer {
  int inputs, outputs;
  Matrix<T> matrix, transposed;
  std::vector<T> bias, shift;

  Layer(int inputs, int outputs, const T *weight, const T *bias, const T *shift)
      : inputs(inputs), outputs(outputs), matrix(outputs, inputs, weight, inputs, 1),
        transposed(inputs, outputs, weight, 1, inputs), bias(bias, bias + outputs),
        shift(shift, shift + outputs) {}

  // done(j, v, sum) for every output of W x + b + t u.
  template <int V, class Done>
  void affine(const Vec<T> *time, const Vec<T> *x, Done done) const {
    const T *b = bias.data(), *u = shift.data();
    Vec<T> t[V];
    std::copy(time, time + V, t);
    matrix.template times<V>(
        x, [&](int j, int v) { return b[j] + t[v] * u[j]; }, done);
  }
};

template <class T> using Layers = std::vector<Layer<T>>;

// What a field is made of. Only a flow has `trace`: see flow.hpp.
template <class T> struct Network {
  Layers<T> layers;
  Matrix<T> trace, trace_transposed;
  bool energy;

  explicit Network(const NetworkSpec &spec)
      : trace(int(spec.trace_outputs), int(spec.trace_inputs),
              static_cast<const T *>(spec.trace), spec.trace_inputs, 1),
        trace_transposed(trace.inputs, trace.outputs,
                         static_cast<const T *>(spec.trace), 1, spec.trace_inputs),
        energy(spec.energy != 0) {
    for (std::int64_t l = 0; l < spec.depth; ++l)
      layers.emplace_back(int(spec.widths[l]), int(spec.widths[l + 1]),
                          static_cast<const T *>(spec.weights[l]),
                          static_cast<const T *>(spec.biases[l]),
                          static_cast<const T *>(spec.shifts[l]));
  }
};

} // namespace skode
