// A multilayer perceptron shifted by time, on a tile of rows.
//
// Layer l computes W_l x + b_l + t u_l; the last one is linear. What the first one reads
// beyond the outputs of the last stands still. A tile is V registers of W lanes, one row to a lane: feature f of a tile is at x[f * V + v]. What belongs to a
// slot (one evaluation of a step) is remembered for its vector-Jacobian product.
#pragma once

#include "activation.hpp"
#include "memory.hpp"
#include "network.hpp"
#include "products.hpp"

#include <algorithm>
#include <vector>

namespace skode {

// What one slot remembers: by layer its input, the gate there, and its cotangent.
template <class T> struct Slot {
  std::vector<Vec<T> *> inputs, gates, deltas;
};

// The field and its derivatives on one tile.
template <class Real, Activation A, int V_> class Perceptron {
public:
  using T = Real;
  static constexpr int V = V_;

  // `slots` = 0: evaluations alone. `state` is the width of a slot's input, of which the
  // first columns, as many as layers[0].inputs, are read.
  Perceptron(const Network<T> &network, int slots, int state)
      : layers_(network.layers), slots_(slots) {
    int widest = 0;
    for (const auto &layer : layers_)
      widest = std::max(widest, layer.outputs);
    for (auto &hidden : hidden_)
      hidden = Array<Vec<T>>(std::size_t(widest) * V);
    for (auto &slot : slots_) {
      for (const auto &layer : layers_) {
        const bool first = slot.inputs.empty();
        slot.inputs.push_back(room(first ? state : layer.inputs));
        slot.gates.push_back(keeps_gate(A) ? room(layer.inputs) : nullptr);
        const bool last = slot.inputs.size() == layers_.size();
        slot.deltas.push_back(room(last ? state : layer.outputs));
      }
    }
    if (slots == 0)
      return;
    int wide = 0;
    for (const auto &layer : layers_) {
      wide = std::max(wide, padded<T>(layer.inputs));
      weights_.emplace_back(layer.outputs, layer.inputs);
      biases_.emplace_back(std::size_t(layer.outputs));
      shifts_.emplace_back(std::size_t(layer.outputs));
    }
    by_row_ = Array<Vec<T>>(std::size_t(slots) * V * wide);
  }

  // f(t, x) into out.
  void evaluate(const Vec<T> *time, const Vec<T> *x, Vec<T> *out) {
    const std::size_t last = layers_.size() - 1;
    for (std::size_t l = 0; l < last; ++l) {
      Vec<T> *into = hidden_[l % 2].data(), gate;
      layers_[l].template affine<V>(time, x, [=, &gate](int j, int v, Vec<T> sum) {
        into[j * V + v] = activate<T, A>(sum, gate);
      });
      x = into;
    }
    layers_[last].template affine<V>(
        time, x, [=](int j, int v, Vec<T> sum) { out[j * V + v] = sum; });
    stand_still(out);
  }

  Vec<T> *input(int slot) { return slots_[slot].inputs[0]; }
  Vec<T> *cotangent(int slot) { return slots_[slot].deltas.back(); }
  const Slot<T> &slot(int slot) const { return slots_[slot]; }

  // f(t, input of the slot) into out; the slot remembers.
  void linearize(int slot, const Vec<T> *time, Vec<T> *out) {
    const auto &memory = slots_[slot];
    const std::size_t last = layers_.size() - 1;
    for (std::size_t l = 0; l < last; ++l) {
      Vec<T> *value = memory.inputs[l + 1], *gates = memory.gates[l + 1];
      layers_[l].template affine<V>(
          time, memory.inputs[l], [=](int j, int v, Vec<T> sum) {
            Vec<T> gate;
            value[j * V + v] = activate<T, A>(sum, gate);
            if constexpr (keeps_gate(A))
              gates[j * V + v] = gate;
          });
    }
    layers_[last].template affine<V>(
        time, memory.inputs[last],
        [=](int j, int v, Vec<T> sum) { out[j * V + v] = sum; });
    stand_still(out);
  }

  // (cotangent of the slot) . df/dy into out.
  void pull(int slot, Vec<T> *out) {
    const auto &memory = slots_[slot];
    for (std::size_t l = layers_.size() - 1; l > 0; --l) {
      const Vec<T> *value = memory.inputs[l], *gate = memory.gates[l];
      Vec<T> *below = memory.deltas[l - 1];
      layers_[l].transposed.template times<V>(
          memory.deltas[l], nothing<T>, [=](int i, int v, Vec<T> sum) {
            below[i * V + v] = sum * slope_of<T, A>(value, gate, i * V + v);
          });
    }
    layers_[0].transposed.template times<V>(
        memory.deltas[0], nothing<T>,
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
      for (int j = 0; j < layers_[l].outputs; ++j) {
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
      weights_[l].add(
          used, [&](int slot) { return slots_[slot].deltas[l]; },
          [&](int slot) { return slots_[slot].inputs[l]; }, by_row_.data());
    }
  }

  // Add what was accumulated to the gradients.
  void gradients(const Gradients &out) const {
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      weights_[l].add_to(static_cast<T *>(out.weights[l]));
      T *bias = static_cast<T *>(out.biases[l]), *shift = static_cast<T *>(out.shifts[l]);
      for (int j = 0; j < layers_[l].outputs; ++j)
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
  std::vector<Products<T, V>> weights_;        // by layer
  std::vector<Array<Vec<T>>> biases_, shifts_; // by layer, lanes not yet summed
  Array<Vec<T>> by_row_;

  void stand_still(Vec<T> *out) const {
    std::fill(out + layers_.back().outputs * V, out + layers_[0].inputs * V, Vec<T>{});
  }

  Vec<T> *room(int width) {
    rooms_.emplace_back(std::size_t(width) * V);
    return rooms_.back().data();
  }
};

} // namespace skode
