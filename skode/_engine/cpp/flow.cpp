// The doors of a flow: a solve's, and those of a march on a grid.
//
// One library for both, since most of its compilation is the field's.
#define SKODE_FIELD Flow
#include "flow.hpp"
#include "march.hpp"
#include "solve.cpp"

extern "C" {

int skode_march(const skode::MarchSpec *spec) {
  return skode::march<Field>(*spec, nullptr);
}

int skode_march_back(const skode::MarchSpec *spec,
                     const skode::MarchCotangents *cotangents) {
  return skode::march<Field>(*spec, cotangents);
}
}
