// Activations, their slopes and their curvatures.
//
// Slopes and curvatures are made of the value and, where that does not tell them, of the
// gate that is kept beside it: a sigmoid.
#pragma once

#include "vector.hpp"

namespace skode {

enum Activation { TANH, SOFTPLUS, SILU, RELU };

constexpr bool keeps_gate(Activation a) { return a == SOFTPLUS || a == SILU; }

template <class T, Activation A> inline Vec<T> activate(Vec<T> x, Vec<T> &gate) {
  if constexpr (A == TANH) {
    return tanh<T>(x);
  } else if constexpr (A == SOFTPLUS) {
    gate = sigmoid<T>(x);
    return softplus<T>(x);
  } else if constexpr (A == SILU) {
    gate = sigmoid<T>(x);
    return x * gate;
  } else {
    return x < T(0) ? Vec<T>{} : x; // NaN passes
  }
}

template <class T, Activation A> inline Vec<T> slope_of(Vec<T> value, Vec<T> gate) {
  if constexpr (A == TANH)
    return T(1) - value * value;
  else if constexpr (A == SOFTPLUS)
    return gate;
  else if constexpr (A == SILU)
    return gate + value * (T(1) - gate);
  else
    return value > T(0) ? splat<T>(T(1)) : Vec<T>{};
}

// The second derivative.
template <class T, Activation A> inline Vec<T> curvature_of(Vec<T> value, Vec<T> gate) {
  if constexpr (A == TANH)
    return T(-2) * value * (T(1) - value * value);
  else if constexpr (A == SOFTPLUS)
    return gate * (T(1) - gate);
  else if constexpr (A == SILU)
    return (T(1) - gate) * (T(2) * gate + value * (T(1) - T(2) * gate));
  else
    return Vec<T>{};
}

// The same of entry i of what was kept; `gate` may be null where none is.
template <class T, Activation A>
inline Vec<T> slope_of(const Vec<T> *value, const Vec<T> *gate, std::size_t i) {
  return slope_of<T, A>(value[i], keeps_gate(A) ? gate[i] : Vec<T>{});
}

template <class T, Activation A>
inline Vec<T> curvature_of(const Vec<T> *value, const Vec<T> *gate, std::size_t i) {
  return curvature_of<T, A>(value[i], keeps_gate(A) ? gate[i] : Vec<T>{});
}

} // namespace skode
