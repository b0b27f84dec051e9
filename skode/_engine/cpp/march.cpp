// The doors of a march and of its gradient; compiled as solve.cpp is.
#include "flow.hpp"
#include "march.hpp"
#include "spec.hpp"
#include "threads.hpp"

#include <memory>
#include <vector>

namespace skode {

// Tiles are shared out among threads in even ranges.
template <class Field>
int march(const MarchSpec &spec, const MarchCotangents *given) {
  using T = typename Field::T;
  constexpr std::int64_t L = March<Field>::L;
  try {
    const Method<T> method(spec.method);
    const Network<T> network(spec.network);
    const std::int64_t tiles = (spec.rows + L - 1) / L;
    std::vector<std::unique_ptr<March<Field>>> workers;
    for (std::int64_t n = 0; n < spec.threads; ++n)
      workers.push_back(std::make_unique<March<Field>>(
          spec, method, network, given, n * tiles / spec.threads,
          (n + 1) * tiles / spec.threads));
    std::vector<char> finished(workers.size(), 0);
    const int progress = share(workers, finished, 0.0);
    if (progress == DONE && given != nullptr && given->gradients.weights != nullptr)
      for (const auto &worker : workers)
        worker->field().gradients(given->gradients);
    return progress;
  } catch (...) {
    return OUT_OF_MEMORY;
  }
}

} // namespace skode

using Field = skode::SKODE_FIELD<SKODE_REAL, skode::SKODE_ACTIVATION, 2>;

extern "C" {

// How many rows a tile takes.
int skode_tile() { return skode::March<Field>::L; }

int skode_march(const skode::MarchSpec *spec) {
  return skode::march<Field>(*spec, nullptr);
}

int skode_march_back(const skode::MarchSpec *spec,
                     const skode::MarchCotangents *cotangents) {
  return skode::march<Field>(*spec, cotangents);
}
}
