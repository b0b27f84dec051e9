// A perceptron with the quadratures of a flow, on a tile of rows.
//
// The state is (y, c, l) or (y, c, l, e), with y' = f(t, y, c), c' = 0, l' = tr df/dy and
// e' = |f|^2: neither l nor e feeds back. With slopes d1 and d2 of two hidden layers,
//
//     tr df/dy = d2 . q,  q = M d1
//
// where M is made of the weights, once per solve, by whoever has the field. With one
// hidden layer M has one row, and d2 is 1; with none it is one number, and d1 is 1 as
// well. Given the cotangents v of y', g of l' and w of e', those of what a perceptron
// computes are
//
//     f:             v + 2 w f
//     second layer:  as in a perceptron, and g q o s''
//     first layer:   as in a perceptron, and (M^T g d2) o s''
//
// and that of M is g d2 x d1.
#pragma once

#include "perceptron.hpp"

namespace skode {

template <class Real, Activation A, int V_> class Flow {
public:
  using T = Real;
  static constexpr int V = V_;

  Flow(const Network<T> &network, int slots, int state)
      : network_(network), field_(network, slots, state),
        dim_(network.layers.back().outputs), inputs_(network.layers[0].inputs),
        now_(made(state)),
        hidden_{tile(below()), tile(above())}, change_(tile(below())),
        trace_(above(), below()),
        by_row_(std::size_t(slots) * V * padded<T>(below())) {
    for (int slot = 0; slot < slots; ++slot)
      slots_.push_back(made(state));
  }

  // The slopes of y, c and the quadratures into out.
  void evaluate(const Vec<T> *time, const Vec<T> *x, Vec<T> *out) {
    const auto &layers = network_.layers;
    const std::size_t last = layers.size() - 1;
    for (std::size_t l = 0; l < last; ++l) {
      Vec<T> *into = hidden_[l].data(), *slope = now_.slopes[l].data();
      layers[l].template affine<V>(time, x, [=](int j, int v, Vec<T> sum) {
        Vec<T> gate = {};
        const Vec<T> value = activate<T, A>(sum, gate);
        into[j * V + v] = value;
        slope[j * V + v] = slope_of<T, A>(value, gate);
      });
      x = into;
    }
    layers[last].template affine<V>(
        time, x, [=](int j, int v, Vec<T> sum) { out[j * V + v] = sum; });
    quadratures(now_, out);
  }

  Vec<T> *input(int slot) { return field_.input(slot); }
  Vec<T> *cotangent(int slot) { return slots_[slot].cotangent.data(); }

  // The same at the input of the slot, which remembers.
  void linearize(int slot, const Vec<T> *time, Vec<T> *out) {
    auto &kept = slots_[slot];
    field_.linearize(slot, time, out);
    std::copy(out, out + dim_ * V, kept.f.data());
    const auto &memory = field_.slot(slot);
    for (int l = 0; l < hidden_layers(); ++l) {
      const Vec<T> *value = memory.inputs[l + 1], *gate = memory.gates[l + 1];
      for (int i = 0; i < network_.layers[l].outputs * V; ++i)
        kept.slopes[l][i] = slope_of<T, A>(value, gate, i);
    }
    quadratures(kept, out);
  }

  // (cotangent of the slot) . d slopes / d (y, c) into out, whose other columns stay 0.
  void pull(int slot, Vec<T> *out) {
    auto &kept = slots_[slot];
    const auto &memory = field_.slot(slot);
    const auto &layers = network_.layers;
    const Vec<T> *given = kept.cotangent.data(), *g = given + inputs_ * V, *w = g + V;
    for (int i = 0; i < dim_ * V; ++i)
      memory.deltas.back()[i] =
          network_.energy ? given[i] + T(2) * w[i % V] * kept.f[i] : given[i];
    for (int i = 0; i < above() * V; ++i) {
      kept.pulled_q[i] = g[i % V] * kept.slopes[1][i];
      kept.q[i] *= g[i % V];
    }
    if (A != RELU) {
      Vec<T> *change = change_.data();
      network_.trace_transposed.template times<V>(
          kept.pulled_q.data(), nothing<T>,
          [=](int i, int v, Vec<T> sum) { change[i * V + v] = sum; });
    }
    for (int l = hidden_layers(); l > 0; --l) {
      const Vec<T> *value = memory.inputs[l], *gate = memory.gates[l];
      const Vec<T> *slope = kept.slopes[l - 1].data();
      const Vec<T> *change = l == 1 ? change_.data() : kept.q.data();
      Vec<T> *delta = memory.deltas[l - 1];
      layers[l].transposed.template times<V>(
          memory.deltas[l], nothing<T>, [=](int i, int v, Vec<T> sum) {
            const std::size_t at = std::size_t(i) * V + v;
            delta[at] = sum * slope[at];
            if (A != RELU)
              delta[at] += change[at] * curvature_of<T, A>(value, gate, at);
          });
    }
    layers[0].transposed.template times<V>(
        memory.deltas[0], nothing<T>,
        [=](int i, int v, Vec<T> sum) { out[i * V + v] = sum; });
  }

  void pull_time(int slot, Vec<T> *out) const { field_.pull_time(slot, out); }

  void accumulate(int used, const Vec<T> *times) {
    field_.accumulate(used, times);
    trace_.add(
        used, [&](int slot) { return slots_[slot].pulled_q.data(); },
        [&](int slot) { return slots_[slot].slopes[0].data(); }, by_row_.data());
  }

  void gradients(const Gradients &out) const {
    field_.gradients(out);
    trace_.add_to(static_cast<T *>(out.trace));
  }

private:
  // What the quadratures need of an evaluation.
  struct Kept {
    Array<Vec<T>> slopes[2], q, pulled_q, f, cotangent;
  };

  const Network<T> &network_;
  Perceptron<T, A, V> field_;
  const int dim_, inputs_; // of y; of y and c
  Kept now_; // of an evaluation that is not to be remembered
  std::vector<Kept> slots_;
  Array<Vec<T>> hidden_[2], change_; // change_: cotangent of d1
  Products<T, V> trace_;
  Array<Vec<T>> by_row_;

  int below() const { return network_.trace.inputs; }
  int above() const { return network_.trace.outputs; }
  int hidden_layers() const { return int(network_.layers.size()) - 1; }
  static Array<Vec<T>> tile(int width) {
    return Array<Vec<T>>(std::size_t(width) * V);
  }

  Kept made(int state) const {
    Kept kept{{tile(below()), tile(above())}, tile(above()), tile(above()), tile(dim_),
              tile(state)};
    for (int l = hidden_layers(); l < 2; ++l) // no layer will ever write these
      std::fill_n(kept.slopes[l].data(), (l == 0 ? below() : above()) * V,
                  splat<T>(T(1)));
    return kept;
  }

  // The slopes behind f, which is in out already.
  void quadratures(Kept &kept, Vec<T> *out) const {
    const Vec<T> *d2 = kept.slopes[1].data();
    Vec<T> *q = kept.q.data(), trace[V] = {};
    network_.trace.template times<V>(
        kept.slopes[0].data(), nothing<T>, [&](int j, int v, Vec<T> sum) {
          q[j * V + v] = sum;
          trace[v] += d2[j * V + v] * sum;
        });
    std::fill(out + dim_ * V, out + inputs_ * V, Vec<T>{});
    std::copy(trace, trace + V, out + inputs_ * V);
    if (!network_.energy)
      return;
    Vec<T> *energy = out + (inputs_ + 1) * V;
    std::fill(energy, energy + V, Vec<T>{});
    for (int i = 0; i < dim_ * V; ++i)
      energy[i % V] += out[i] * out[i];
  }
};

} // namespace skode
