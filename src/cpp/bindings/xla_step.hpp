// SPDX-License-Identifier: MIT
//
// Handlers of calls from programs that XLA compiles: fusedadam/xla.py makes these calls.
#pragma once

#include <cstdint>

#include "bindings/xla_ffi.hpp"

namespace fusedadam::xla {

// A call is batched if `count` has several elements, one for each member of the batch: then every
// other buffer has as many equal parts. Attributes: settings by their names, and
//
//   undecayed    indices of the tensors without weight decay
//   updates      whether to write updates instead of stepping the parameters
//   keras_norms  whether a norm for clipping that is not finite makes gradients NaN, as in Keras 3
//
// `count` counts the calls of the optimizer, int32. `lr` is float32 or float64, or two uint32 that
// are the bits of a float64.
//
// If a step has several calls, `begin_step` comes first, once it has the gradients of all tensors:
//
//   begin_step(count, [grad, [accumulator]]...) -> (count, shared)
//
// `shared` are the bits of a SharedStep as uint32. Then for some of the tensors each:
//
//   step(count or shared, lr, [param, grad, state...]...) -> ([count], [param, state...]...)
//
// `count` is a result if it is an argument. Each result but `shared` is in the memory of its
// argument. The state of a tensor is what its type and the settings need, in the order of
// state_kinds. With `updates` there is no param, and the result in its place is the update, in the
// memory of the gradient.
inline constexpr std::int64_t shared_words = 6;

Error* begin_step(CallFrame* frame) noexcept;
Error* step(CallFrame* frame) noexcept;

}  // namespace fusedadam::xla
