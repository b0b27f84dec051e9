// A multilayer perceptron shifted by time, on a tile of rows.
//
// Layer l computes W_l x + b_l + t u_l; the last one is linear. A tile is V registers of
// W lanes, one row to a lane: feature f of a tile is at x[f * V + v]. What belongs to a
// slot (one evaluation of a step) is remembered for its vector-Jacobian product.
#pragma once

#include "memory.hpp"
#include "vector.hpp"

#include <algorithm>
#include <vector>

namespace skode {

enum Activation { TANH, SOFTPLUS, SILU, RELU };

// Whether the slope is kept beside the value, which does not tell it.
constexpr bool keeps_slope(Activation a) { return a == SOFTPLUS || a == SILU; }

template <class T, Activation A>
inline Vec<T> activate(Vec<T> x, Vec<T> &slope) {
  if constexpr (A == TANH) {
    return tanh<T>(x);
  } else if constexpr (A == SOFTPLUS) {
    slope = sigmoid<T>(x);
    return softplus<T>(x);
  } else if constexpr (A == SILU) {
    const Vec<T> gate = sigmoid<T>(x), value = x * gate;
    slope = gate + value * (T(1) - gate);
    return value;
  } else {
    return x < T(0) ? Vec<T>{} : x; // NaN passes
  }
}

// The slope, of what was kept: it, or the value.
template <class T, Activation A> inline Vec<T> slope_of(Vec<T> kept) {
  if constexpr (A == TANH)
    return T(1) - kept * kept;
  else if constexpr (A == RELU)
    return kept > T(0) ? splat<T>(T(1)) : Vec<T>{};
  else
    return kept;
}

// Outputs at a time: their sums fill half of the registers, or two thirds.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int BLOCK = 8;
#else
constexpr int BLOCK = 4;
#endif

// A matrix (outputs, inputs), by blocks of outputs: the order in which it is read.
template <class T> class Matrix {
public:
  int outputs = 0, inputs = 0;

  Matrix(int outputs, int inputs) : outputs(outputs), inputs(inputs) {
    data_.resize(std::size_t(outputs) * inputs);
  }

  T &at(int j, int i) {
    int first = j - j % BLOCK, width = BLOCK;
    while (first + width > outputs) { // behind the last whole block
      width /= 2;
      if (first + width <= outputs && first + width <= j)
        first += width;
    }
    return data_[std::size_t(first) * inputs + std::size_t(i) * width + (j - first)];
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
      : inputs(inputs), outputs(outputs), matrix(outputs, inputs),
        transposed(inputs, outputs), bias(bias, bias + outputs),
        shift(shift, shift + outputs) {
    for (int j = 0; j < outputs; ++j)
      for (int i = 0; i < inputs; ++i)
        matrix.at(j, i) = transposed.at(i, j) = weight[std::size_t(j) * inputs + i];
  }
};

template <class T> using Layers = std::vector<Layer<T>>;

// What one slot remembers: by layer its input, the slope there, and its cotangent.
template <class T> struct Slot {
  std::vector<Vec<T> *> inputs, slopes, deltas;
};

// The field and its derivatives on one tile.
template <class T, Activation A, int V> class Perceptron {
public:
  // `slots` = 0: evaluations alone.
  Perceptron(const Layers<T> &layers, int slots) : layers_(layers), slots_(slots) {
    int widest = 0;
    for (const auto &layer : layers_)
      widest = std::max(widest, layer.outputs);
    for (auto &hidden : hidden_)
      hidden = Array<Vec<T>>(std::size_t(widest) * V);
    for (auto &slot : slots_) {
      for (const auto &layer : layers_) {
        slot.inputs.push_back(room(layer.inputs));
        slot.slopes.push_back(keeps_slope(A) ? room(layer.inputs) : nullptr);
        slot.deltas.push_back(room(layer.outputs));
      }
    }
    if (slots == 0)
      return;
    int wide = 0;
    for (const auto &layer : layers_) {
      const int stride = padded(layer.inputs);
      wide = std::max(wide, stride);
      weights_.emplace_back(std::size_t(layer.outputs) * stride / lanes<T>);
      biases_.emplace_back(std::size_t(layer.outputs));
      shifts_.emplace_back(std::size_t(layer.outputs));
    }
    by_row_ = Array<Vec<T>>(std::size_t(slots) * V * wide);
  }

  // f(t, x) into out.
  void evaluate(const Vec<T> *time, const Vec<T> *x, Vec<T> *out) {
    const std::size_t last = layers_.size() - 1;
    for (std::size_t l = 0; l < last; ++l) {
      Vec<T> *into = hidden_[l % 2].data(), slope;
      affine(layers_[l], time, x, [=, &slope](int j, int v, Vec<T> sum) {
        into[j * V + v] = activate<T, A>(sum, slope);
      });
      x = into;
    }
    affine(layers_[last], time, x,
           [=](int j, int v, Vec<T> sum) { out[j * V + v] = sum; });
  }

  Vec<T> *input(int slot) { return slots_[slot].inputs[0]; }
  Vec<T> *cotangent(int slot) { return slots_[slot].deltas.back(); }

  // f(t, input of the slot) into out; the slot remembers.
  void linearize(int slot, const Vec<T> *time, Vec<T> *out) {
    const auto &memory = slots_[slot];
    const std::size_t last = layers_.size() - 1;
    for (std::size_t l = 0; l < last; ++l) {
      Vec<T> *value = memory.inputs[l + 1], *slopes = memory.slopes[l + 1];
      affine(layers_[l], time, memory.inputs[l], [=](int j, int v, Vec<T> sum) {
        Vec<T> slope;
        value[j * V + v] = activate<T, A>(sum, slope);
        if constexpr (keeps_slope(A))
          slopes[j * V + v] = slope;
      });
    }
    affine(layers_[last], time, memory.inputs[last],
           [=](int j, int v, Vec<T> sum) { out[j * V + v] = sum; });
  }

  // (cotangent of the slot) . df/dy into out.
  void pull(int slot, Vec<T> *out) {
    const auto &memory = slots_[slot];
    const auto nothing = [](int, int) { return Vec<T>{}; };
    for (std::size_t l = layers_.size() - 1; l > 0; --l) {
      const Vec<T> *kept = keeps_slope(A) ? memory.slopes[l] : memory.inputs[l];
      Vec<T> *below = memory.deltas[l - 1];
      layers_[l].transposed.template times<V>(
          memory.deltas[l], nothing, [=](int i, int v, Vec<T> sum) {
            below[i * V + v] = sum * slope_of<T, A>(kept[i * V + v]);
          });
    }
    layers_[0].transposed.template times<V>(
        memory.deltas[0], nothing,
        [=](int i, int v, Vec<T> sum) { out[i * V + v] = sum; });
  }

  // (cotangent of the slot) . df/dt, after pull.
  void pull_time(int slot, Vec<T> *out) const {
    std::fill(out, out + V, Vec<T>{});
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const Vec<T> *delta = slots_[slot].deltas[l];
      for (int j = 0; j < layers_[l].outputs; ++j)
        for (int v = 0; v < V; ++v)
          out[v] += delta[j * V + v] * layers_[l].shift[j];
    }
  }

  // Add the parameter gradient of the first slots, at times[slot * V + v].
  void accumulate(int used, const Vec<T> *times) {
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const auto &layer = layers_[l];
      for (int j = 0; j < layer.outputs; ++j) {
        Vec<T> bias = biases_[l][j], shift = shifts_[l][j];
        for (int slot = 0; slot < used; ++slot)
          for (int v = 0; v < V; ++v) {
            const Vec<T> delta = slots_[slot].deltas[l][j * V + v];
            bias += delta;
            shift += delta * times[slot * V + v];
          }
        biases_[l][j] = bias;
        shifts_[l][j] = shift;
      }
      lay_out_by_row(used, int(l));
      int first = 0;
      for (; first + BLOCK <= layer.outputs; first += BLOCK)
        outer<BLOCK>(used, int(l), first);
      for (; first < layer.outputs; ++first)
        outer<1>(used, int(l), first);
    }
  }

  // Add what was accumulated to layer l's gradients.
  void gradients(int l, T *weight, T *bias, T *shift) const {
    const auto &layer = layers_[l];
    const int stride = padded(layer.inputs);
    const T *sums = reinterpret_cast<const T *>(weights_[l].data());
    for (int j = 0; j < layer.outputs; ++j) {
      for (int i = 0; i < layer.inputs; ++i)
        weight[std::size_t(j) * layer.inputs + i] += sums[std::size_t(j) * stride + i];
      for (int lane = 0; lane < lanes<T>; ++lane) {
        bias[j] += biases_[l][j][lane];
        shift[j] += shifts_[l][j][lane];
      }
    }
  }

private:
  const Layers<T> &layers_;
  std::vector<Slot<T>> slots_;
  std::vector<Array<Vec<T>>> rooms_;
  Array<Vec<T>> hidden_[2];
  std::vector<Array<Vec<T>>> weights_; // by layer (outputs, padded inputs)
  std::vector<Array<Vec<T>>> biases_, shifts_; // by layer, lanes not yet summed
  Array<Vec<T>> by_row_;

  Vec<T> *room(int width) {
    rooms_.emplace_back(std::size_t(width) * V);
    return rooms_.back().data();
  }

  static int padded(int width) {
    return (width + lanes<T> - 1) / lanes<T> * lanes<T>;
  }

  template <class Done>
  static void affine(const Layer<T> &layer, const Vec<T> *time, const Vec<T> *x,
                     Done done) {
    const T *bias = layer.bias.data(), *shift = layer.shift.data();
    Vec<T> t[V];
    std::copy(time, time + V, t);
    layer.matrix.template times<V>(
        x, [&](int j, int v) { return bias[j] + t[v] * shift[j]; }, done);
  }

  // A slot's rows one behind the other, each with its features side by side.
  void lay_out_by_row(int used, int l) {
    constexpr int W = lanes<T>;
    const int width = layers_[l].inputs, stride = padded(width) / W;
    Vec<T> block[W];
    for (int slot = 0; slot < used; ++slot)
      for (int v = 0; v < V; ++v)
        for (int part = 0; part < stride; ++part) {
          const Vec<T> *x = slots_[slot].inputs[l] + std::size_t(part) * W * V + v;
          for (int f = 0; f < W; ++f)
            block[f] = part * W + f < width ? x[f * V] : Vec<T>{};
          transpose<T>(block);
          Vec<T> *row = by_row_.data() + std::size_t(slot * V + v) * W * stride + part;
          for (int lane = 0; lane < W; ++lane)
            row[std::size_t(lane) * stride] = block[lane];
        }
  }

  // Weights' gradient of J outputs: sum over slots and rows of cotangent x input.
  template <int J> void outer(int used, int l, int first) {
    const int stride = padded(layers_[l].inputs) / lanes<T>;
    int part = 0;
    for (; part + 2 <= stride; part += 2)
      outer<J, 2>(used, l, first, part, stride);
    if (part < stride)
      outer<J, 1>(used, l, first, part, stride);
  }

  template <int J, int P>
  void outer(int used, int l, int first, int part, int stride) {
    constexpr int W = lanes<T>;
    Vec<T> sum[J][P] = {};
    const Vec<T> *x = by_row_.data() + part;
    for (int slot = 0; slot < used; ++slot)
      for (int v = 0; v < V; ++v) {
        const T *delta = reinterpret_cast<const T *>(
            slots_[slot].deltas[l] + std::size_t(first) * V + v);
        for (int lane = 0; lane < W; ++lane, x += stride)
          for (int j = 0; j < J; ++j)
            for (int p = 0; p < P; ++p)
              sum[j][p] += delta[std::size_t(j) * V * W + lane] * x[p];
      }
    for (int j = 0; j < J; ++j)
      for (int p = 0; p < P; ++p)
        weights_[l][std::size_t(first + j) * stride + part + p] += sum[j][p];
  }
};

} // namespace skode
