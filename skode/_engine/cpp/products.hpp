// The gradient of a matrix: outer products summed over the slots and rows of a tile.
#pragma once

#include "memory.hpp"
#include "network.hpp"

namespace skode {

// Numbers of a row of so many, filled up to whole registers.
template <class T> constexpr int padded(int width) {
  return (width + lanes<T> - 1) / lanes<T> * lanes<T>;
}

template <class T, int V> class Products {
public:
  Products(int outputs, int inputs)
      : outputs_(outputs), inputs_(inputs), stride_(padded<T>(inputs) / lanes<T>),
        sums_(std::size_t(outputs) * stride_) {}

  // Add cotangent x input of the first slots, which deltas(slot) and inputs(slot) give;
  // by_row is memory for the inputs of all of them.
  template <class Deltas, class Inputs>
  void add(int used, Deltas deltas, Inputs inputs, Vec<T> *by_row) {
    lay_out_by_row(used, inputs, by_row);
    int first = 0;
    for (; first + BLOCK <= outputs_; first += BLOCK)
      outer<BLOCK>(used, deltas, by_row, first);
    for (; first < outputs_; ++first)
      outer<1>(used, deltas, by_row, first);
  }

  // Add the sums to a gradient (outputs, inputs).
  void add_to(T *gradient) const {
    const T *sums = reinterpret_cast<const T *>(sums_.data());
    for (int j = 0; j < outputs_; ++j)
      for (int i = 0; i < inputs_; ++i)
        gradient[std::size_t(j) * inputs_ + i] +=
            sums[std::size_t(j) * stride_ * lanes<T> + i];
  }

private:
  int outputs_, inputs_, stride_;
  Array<Vec<T>> sums_; // (outputs, padded inputs)

  // A slot's rows one behind the other, each with its features side by side.
  template <class Inputs>
  void lay_out_by_row(int used, Inputs inputs, Vec<T> *by_row) {
    constexpr int W = lanes<T>;
    Vec<T> block[W];
    for (int slot = 0; slot < used; ++slot)
      for (int v = 0; v < V; ++v)
        for (int part = 0; part < stride_; ++part) {
          const Vec<T> *x = inputs(slot) + std::size_t(part) * W * V + v;
          for (int f = 0; f < W; ++f)
            block[f] = part * W + f < inputs_ ? x[f * V] : Vec<T>{};
          transpose<T>(block);
          Vec<T> *row = by_row + std::size_t(slot * V + v) * W * stride_ + part;
          for (int lane = 0; lane < W; ++lane)
            row[std::size_t(lane) * stride_] = block[lane];
        }
  }

  // The gradient of J outputs.
  template <int J, class Deltas>
  void outer(int used, Deltas deltas, const Vec<T> *by_row, int first) {
    int part = 0;
    for (; part + 2 <= stride_; part += 2)
      outer<J, 2>(used, deltas, by_row, first, part);
    if (part < stride_)
      outer<J, 1>(used, deltas, by_row, first, part);
  }

  template <int J, int P, class Deltas>
  void outer(int used, Deltas deltas, const Vec<T> *by_row, int first, int part) {
    constexpr int W = lanes<T>;
    Vec<T> sum[J][P] = {};
    const Vec<T> *x = by_row + part;
    for (int slot = 0; slot < used; ++slot)
      for (int v = 0; v < V; ++v) {
        const T *delta =
            reinterpret_cast<const T *>(deltas(slot) + std::size_t(first) * V + v);
        for (int lane = 0; lane < W; ++lane, x += stride_)
          for (int j = 0; j < J; ++j)
            for (int p = 0; p < P; ++p)
              sum[j][p] += delta[std::size_t(j) * V * W + lane] * x[p];
      }
    for (int j = 0; j < J; ++j)
      for (int p = 0; p < P; ++p)
        sums_[std::size_t(first + j) * stride_ + part + p] += sum[j][p];
  }
};

} // namespace skode
