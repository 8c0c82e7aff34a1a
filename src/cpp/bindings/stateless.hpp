// SPDX-License-Identifier: MIT
//
// Functions without optimizer state.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "fusedadam/options.hpp"
#include "fusedadam/progress.hpp"

namespace fusedadam::python {

namespace py = pybind11;

// Returns the gradients unscaled and clipped as in a step with these options: new arrays if any
// value changes, else the given ones.
py::list clip_gradients(const py::handle& params, const py::handle& grads,
                        const AdamOptions& options, const AdamProgress& progress);

double global_norm(const py::handle& arrays);

// Conversions between arrays as they are stored and new or given arrays of float32 (docs/storage.md
// has the formats). Arrays may be NumPy arrays or CPU tensors and must be alike in shape and
// layout.
// @throws py::type_error, py::value_error  naming the argument

// Returns weights joined with their low bits; `low_bits` may be None.
py::array join_weights(const py::handle& param, const py::handle& low_bits);
// Sets weights and their low bits, rounded to nearest.
void split_weights(const py::handle& values, const py::handle& param, const py::handle& low_bits);
// Returns (m, v).
py::tuple unpack_moments(const py::handle& packed);
// Sets packed moments, rounded to nearest.
void pack_moments(const py::handle& m, const py::handle& v, const py::handle& packed);

}  // namespace fusedadam::python
