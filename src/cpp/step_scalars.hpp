// SPDX-License-Identifier: MIT
//
// The scalars of a step: formed in double, rounded once to the precision of a tensor.
#pragma once

#include <cstdint>
#include <optional>

#include "fusedadam/options.hpp"
#include "kernel_table.hpp"

namespace fusedadam {

// lr_t of include/fusedadam/adam.hpp. Must run in the default floating-point environment, like all
// of this file.
double bias_corrected_lr(const AdamSettings& settings, std::int64_t step) noexcept;

// Whether the settings clip by the global norm; 0 clips nothing, as in Keras.
bool clips_by_norm(const AdamSettings& settings) noexcept;

// sqrt(sum_of_squares) >= clipnorm ? clipnorm / sqrt(sum_of_squares) : no value.
std::optional<double> clip_scale(const AdamSettings& settings, double sum_of_squares) noexcept;

template <class T>
AdamConstants<T> make_constants(const AdamSettings& settings, double lr_t,
                                std::optional<double> clip_scale) noexcept;

}  // namespace fusedadam
