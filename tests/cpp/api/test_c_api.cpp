// SPDX-License-Identifier: MIT
//
// The C interface does what the C++ interface does. What callers may hand over is tested there.
#include <gtest/gtest.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "api/c_call.hpp"
#include "api/settings_table.hpp"
#include "fusedadam/fusedadam.h"
#include "fusedadam/norm.hpp"
#include "support/stored.hpp"
#include "support/training.hpp"

namespace fusedadam {
namespace {

// ---- C arguments from those of C++ -------------------------------------------------------------

// The status of a call and its message: "0 ", or "1 lr must be finite. Received: lr=nan".
template <class Function, class... Arguments>
std::string said(Function function, Arguments... arguments) {
  char message[1000] = "unset";
  const std::int32_t status = function(arguments..., message, sizeof message);
  return std::to_string(status) + ' ' + message;
}

#define ASSERT_SUCCESS(...) ASSERT_EQ(said(__VA_ARGS__), "0 ")
#define EXPECT_SUCCESS(...) EXPECT_EQ(said(__VA_ARGS__), "0 ")

struct Free {
  void operator()(fusedadam_options* options) const { fusedadam_options_free(options); }
};
using Options = std::unique_ptr<fusedadam_options, Free>;

Options new_options() {
  fusedadam_options* options = nullptr;
  EXPECT_SUCCESS(fusedadam_options_create, &options);
  return Options(options);
}

void set(fusedadam_options* options, const char* name, double value) {
  EXPECT_SUCCESS(fusedadam_options_set_double, options, name, value);
}
void set(fusedadam_options* options, const char* name, std::int64_t value) {
  EXPECT_SUCCESS(fusedadam_options_set_int64, options, name, value);
}
void set(fusedadam_options* options, const char* name, bool value) {
  EXPECT_SUCCESS(fusedadam_options_set_bool, options, name, value);
}
template <class T>
void set(fusedadam_options* options, const char* name, const std::optional<T>& value) {
  if (value) return set(options, name, *value);
  EXPECT_SUCCESS(fusedadam_options_reset, options, name);
}
template <class Enum>
requires std::is_enum_v<Enum>
void set(fusedadam_options* options, const char* name, Enum value) {
  const char* const text = names_of(value)[static_cast<std::size_t>(value)];
  EXPECT_SUCCESS(fusedadam_options_set_text, options, name, text == nullptr ? "none" : text);
}

Options options_of(const AdamSettings& settings) {
  Options options = new_options();
  for (const Setting& setting : settings_table()) {
    std::visit([&](auto member) { set(options.get(), setting.name, settings.*member); },
               setting.member);
  }
  set(options.get(), "dynamic_loss_scale", settings.dynamic_loss_scale);
  return options;
}

fusedadam_array array_of(const ArrayPointer& array) {
  return {array.data, static_cast<std::int32_t>(array.type)};
}

fusedadam_tensor tensor_of(const MixedTensor& t) {
  return {sizeof(fusedadam_tensor),
          array_of(t.param),
          array_of(t.grad),
          t.size,
          array_of(t.m),
          array_of(t.v),
          array_of(t.packed),
          array_of(t.low_bits),
          array_of(t.vhat),
          array_of(t.ema),
          array_of(t.accumulator),
          t.first_index};
}

template <class T>
fusedadam_tensor tensor_of(Arrays<T>& a) {
  return tensor_of(MixedTensor{.param = a.param.data(),
                               .grad = a.grad.data(),
                               .size = std::ssize(a.param),
                               .m = a.m.data(),
                               .v = a.v.data(),
                               .vhat = a.vhat.data(),
                               .ema = a.ema.data(),
                               .accumulator = a.accumulator.data()});
}

fusedadam_progress progress_of(const AdamProgress& p) {
  return {sizeof(fusedadam_progress), p.iterations, p.skipped_steps, p.accumulated,
          p.dynamic_loss_scale,       p.good_steps};
}

AdamProgress progress_of(const fusedadam_progress& p) {
  return {p.iterations, p.skipped_steps, p.accumulated, p.dynamic_loss_scale, p.good_steps};
}

// What a step is given, in C.
struct Given {
  std::vector<Options> options;
  std::vector<std::vector<fusedadam_tensor>> tensors;
  std::vector<fusedadam_group> groups;

  explicit Given(Groups& from) : tensors(from.size()) {
    for (std::size_t i = 0; i < from.size(); ++i) {
      options.push_back(options_of(from[i].settings));
      for (auto& any : from[i].tensors) {
        tensors[i].push_back(std::visit([](auto& arrays) { return tensor_of(arrays); }, any));
      }
      groups.push_back({sizeof(fusedadam_group), tensors[i].data(), tensors[i].size(),
                        options[i].get(), from[i].steps ? &*from[i].steps : nullptr});
    }
  }
};

StepOutcome take_c_step(Groups& groups, AdamProgress& progress) {
  const Given given(groups);
  fusedadam_progress counts = progress_of(progress);
  std::int32_t outcome = -1;
  EXPECT_SUCCESS(fusedadam_step, given.groups.data(), given.groups.size(), &counts, &outcome);
  progress = progress_of(counts);
  return static_cast<StepOutcome>(outcome);
}

// ---- options -----------------------------------------------------------------------------------

// What a getter gets, as text.
std::string got(const fusedadam_options* options, const char* name, double) {
  double value = nan;
  const std::string failure = said(fusedadam_options_get_double, options, name, &value);
  return failure == "0 " ? format_number(value) : failure;
}
std::string got(const fusedadam_options* options, const char* name, std::int64_t) {
  std::int64_t value = -1;
  const std::string failure = said(fusedadam_options_get_int64, options, name, &value);
  return failure == "0 " ? std::to_string(value) : failure;
}
std::string got(const fusedadam_options* options, const char* name, bool) {
  std::int32_t value = -1;
  const std::string failure = said(fusedadam_options_get_bool, options, name, &value);
  return failure == "0 " ? std::to_string(value) : failure;
}
std::string got(const fusedadam_options* options, const char* name, const char*) {
  const char* value = nullptr;
  const std::string failure = said(fusedadam_options_get_text, options, name, &value);
  return failure == "0 " ? value : failure;
}

std::string text_of(double value) { return format_number(value); }
std::string text_of(std::int64_t value) { return std::to_string(value); }
std::string text_of(bool value) { return std::to_string(value ? 1 : 0); }

template <class T>
void expect_got(const fusedadam_options* options, const char* name, const T& value) {
  std::int32_t is_set = -1;
  EXPECT_SUCCESS(fusedadam_options_is_set, options, name, &is_set);
  EXPECT_EQ(is_set, 1) << name;
  if constexpr (std::is_enum_v<T>) {
    const char* const text = names_of(value)[static_cast<std::size_t>(value)];
    EXPECT_EQ(got(options, name, ""), text == nullptr ? "none" : text);
  } else {
    EXPECT_EQ(got(options, name, T{}), text_of(value)) << name;
  }
}
template <class T>
void expect_got(const fusedadam_options* options, const char* name, const std::optional<T>& value) {
  if (value) return expect_got(options, name, *value);
  std::int32_t is_set = -1;
  EXPECT_SUCCESS(fusedadam_options_is_set, options, name, &is_set);
  EXPECT_EQ(is_set, 0) << name;
  EXPECT_EQ(got(options, name, T{}),
            "1 " + std::string(name) + " must be set before it is read. Received: none");
}

// The defaults are valid in every order, and so is each setting on its own after use_ema.
TEST(COptions, HaveEverySettingByName) {
  AdamSettings stored = everything;
  stored.amsgrad = false;
  stored.moments = Moments::packed;
  stored.low_bits = LowBits::int8;
  stored.seed = INT64_MAX;
  AdamSettings rounded = dynamic_everything(5);
  rounded.clipnorm.reset();
  rounded.clipnorm_per_tensor = 0.5;
  rounded.moments = Moments::automatic;
  rounded.low_bits = LowBits::int16;
  rounded.rounding = Rounding::nearest;
  rounded.skip_nonfinite = true;
  for (const AdamSettings& settings : {AdamSettings{}, stored, rounded}) {
    const Options options = options_of(settings);
    EXPECT_EQ(options->checked.settings(), settings);
    for (const Setting& setting : settings_table()) {
      std::visit([&](auto member) { expect_got(options.get(), setting.name, settings.*member); },
                 setting.member);
    }
    expect_got(options.get(), "dynamic_loss_scale", settings.dynamic_loss_scale);

    fusedadam_options* copied = nullptr;
    ASSERT_SUCCESS(fusedadam_options_copy, options.get(), &copied);
    const Options copy(copied);
    set(copy.get(), "lr", 0.5);
    EXPECT_EQ(options->checked.settings(), settings);
    ASSERT_SUCCESS(fusedadam_options_reset, copy.get(), "dynamic_loss_scale");
    const auto table = settings_table();
    for (auto setting = table.rbegin(); setting != table.rend(); ++setting) {
      ASSERT_SUCCESS(fusedadam_options_reset, copy.get(), setting->name);
    }
    EXPECT_EQ(copy->checked.settings(), AdamSettings{});
  }
}

TEST(COptions, RefuseWhatIsNotValidAndKeepTheirs) {
  const Options options = new_options();
  fusedadam_options* const o = options.get();
  fusedadam_options* const none = nullptr;
  const char* const no_name = nullptr;
  EXPECT_EQ(said(fusedadam_options_set_double, o, "lr", nan),
            "1 lr must be finite. Received: lr=nan");
  EXPECT_EQ(said(fusedadam_options_set_double, o, "ema_momentum", 0.5),
            "1 ema_momentum needs averages: use_ema, or ema of the Python function adam_step. "
            "Received: ema_momentum=0.5 without use_ema");
  EXPECT_EQ(said(fusedadam_options_set_double, o, "seed", 1.0),
            "1 seed must be used by the functions for int64. Received: double");
  EXPECT_EQ(said(fusedadam_options_set_int64, o, "clipnorm", std::int64_t{1}),
            "1 clipnorm must be used by the functions for double. Received: int64");
  EXPECT_EQ(said(fusedadam_options_set_bool, o, "moments", 1),
            "1 moments must be used by the functions for text. Received: bool");
  EXPECT_EQ(said(fusedadam_options_set_text, o, "amsgrad", "true"),
            "1 amsgrad must be used by the functions for bool. Received: text");
  EXPECT_EQ(said(fusedadam_options_set_text, o, "low_bits", "int32"),
            "1 low_bits must be one of none, int8, int16. Received: 'int32'");
  EXPECT_EQ(said(fusedadam_options_set_text, o, "low_bits", no_name),
            "1 value must not be null. Received: null");
  const std::string unknown = said(fusedadam_options_set_bool, o, "learning_rate", 1);
  EXPECT_TRUE(unknown.starts_with("1 name must be one of lr, beta_1, ")) << unknown;
  EXPECT_TRUE(unknown.ends_with(", seed, dynamic_loss_scale. Received: 'learning_rate'"));
  EXPECT_EQ(said(fusedadam_options_reset, o, no_name), "1 name must not be null. Received: null");
  EXPECT_EQ(said(fusedadam_options_reset, none, "lr"),
            "1 options must not be null. Received: null");
  EXPECT_EQ(got(o, "lr", true), "1 lr must be used by the functions for double. Received: bool");
  EXPECT_EQ(got(none, "lr", 0.0), "1 options must not be null. Received: null");
  double* const nowhere = nullptr;
  EXPECT_EQ(said(fusedadam_options_get_double, o, "lr", nowhere),
            "1 value must not be null. Received: null");
  EXPECT_EQ(o->checked.settings(), AdamSettings{});
  fusedadam_options_free(nullptr);
}

// ---- calls -------------------------------------------------------------------------------------

TEST(CStep, EqualsReference) {
  const Groups before{{mixed_tensors(1), dynamic_everything(2)},
                      {{}, dynamic_everything(2)},
                      {mixed_tensors(1000), dynamic_everything(2), 7}};
  expect_reference(
      before, {.iterations = 3, .skipped_steps = 1, .good_steps = 1999}, 4,
      [](Groups& groups, int call) {
        if (call == 3)
          std::get<Arrays<float>>(groups[0].tensors[2]).grad[5] = static_cast<float>(inf);
      },
      take_c_step);
  AdamProgress progress;
  Groups none;
  EXPECT_EQ(take_c_step(none, progress), StepOutcome::taken);
  EXPECT_EQ(progress.iterations, 1);
}

TEST(CStep, TakesTensorsStoredInFewerBits) {
  const AdamSettings settings{.amsgrad = true,
                              .zero_grad = true,
                              .moments = Moments::bfloat16,
                              .low_bits = LowBits::int8,
                              .seed = 5};
  AdamSettings packed = settings;
  packed.amsgrad = false;
  packed.moments = Moments::packed;
  packed.low_bits = LowBits::int16;
  for (const AdamSettings& s : {settings, packed}) {
    const Options options = options_of(s);
    StoredTensor expected = new_tensor(ElementType::bfloat16, ElementType::bfloat16, 3000, s);
    expected.first_index = 11;
    StoredTensor actual = expected;
    const AnyTensor view = expected.view();
    adam_step(std::span(&view, 1), s, 1);

    const fusedadam_tensor tensor = tensor_of(actual.view());
    const fusedadam_group group{sizeof group, &tensor, 1, options.get(), nullptr};
    fusedadam_progress progress = FUSEDADAM_PROGRESS_INIT;
    std::int32_t* const not_asked = nullptr;
    ASSERT_SUCCESS(fusedadam_step, &group, 1U, &progress, not_asked);
    EXPECT_EQ(progress.iterations, 1);
    EXPECT_TRUE(actual == expected);

    std::vector<float> param(3000), m(3000), v(3000), c_param(3000), c_m(3000), c_v(3000);
    read_values(std::get<MixedTensor>(view), s, {param.data(), m.data(), v.data()});
    const fusedadam_values values{sizeof values, c_param.data(), c_m.data(), c_v.data(), nullptr};
    ASSERT_SUCCESS(fusedadam_read_values, &tensor, options.get(), &values);
    EXPECT_EQ(c_param, param);
    EXPECT_EQ(c_m, m);
    EXPECT_EQ(c_v, v);
    std::ranges::fill(actual.bytes[kind::param], std::byte{1});
    std::ranges::fill(actual.bytes[kind::low_bits], std::byte{1});
    ASSERT_SUCCESS(fusedadam_write_values, &tensor, options.get(), &values);
    EXPECT_TRUE(actual == expected);
  }
}

template <class Index, class T>
void check_rows(SparseMode mode) {
  const auto before = sparse_arrays<T>(50, 3, 20, 1);
  auto expected = before, actual = before;
  AdamProgress progress{.iterations = 4};
  const StepOutcome outcome = take_step<Index>(expected, everything, progress, mode);

  const std::vector<Index> indices(before.indices.begin(), before.indices.end());
  const fusedadam_tensor table = tensor_of(actual.table);
  const fusedadam_sparse_tensor tensor{sizeof tensor,
                                       &table,
                                       3,
                                       indices.data(),
                                       8 * sizeof(Index),
                                       20,
                                       array_of(actual.grad_rows.data())};
  const Options options = options_of(everything);
  fusedadam_progress counts = progress_of(AdamProgress{.iterations = 4});
  std::int32_t c_outcome = -1;
  ASSERT_SUCCESS(fusedadam_step_sparse, &tensor, options.get(), static_cast<std::int32_t>(mode),
                 &counts, &c_outcome);
  EXPECT_EQ(c_outcome, static_cast<std::int32_t>(outcome));
  EXPECT_EQ(progress_of(counts), progress);
  EXPECT_TRUE(same_bits(actual, expected));
}

TEST(CStep, TakesRowsOfTables) {
  for (const SparseMode mode : {SparseMode::lazy, SparseMode::dense}) {
    check_rows<std::int32_t, float>(mode);
    check_rows<std::int64_t, double>(mode);
  }
}

TEST(CNorm, IsThatOfArraysOfAnyType) {
  const float floats[] = {1, 2};
  const double doubles[] = {4};
  const float16 half[] = {float16{0x4400}};     // 4
  const bfloat16 brain[] = {bfloat16{0x40a0}};  // 5
  constexpr std::size_t size = sizeof(fusedadam_const_array);
  const fusedadam_const_array arrays[] = {{size, floats, FUSEDADAM_FLOAT32, 2},
                                          {size, doubles, FUSEDADAM_FLOAT64, 1},
                                          {size, nullptr, FUSEDADAM_FLOAT64, 0},
                                          {size, half, FUSEDADAM_FLOAT16, 1},
                                          {size, brain, FUSEDADAM_BFLOAT16, 1}};
  double norm = 0;
  ASSERT_SUCCESS(fusedadam_global_norm, arrays, std::size(arrays), &norm);
  EXPECT_EQ(norm, std::sqrt(62.0));
}

TEST(CThreads, AndInstructionSetsAreThoseOfTheLibrary) {
  const int before = fusedadam_get_num_threads();
  EXPECT_EQ(before, get_num_threads());
  ASSERT_SUCCESS(fusedadam_set_num_threads, std::int64_t{3});
  EXPECT_EQ(get_num_threads(), 3);
  EXPECT_EQ(said(fusedadam_set_num_threads, std::int64_t{0}),
            "1 threads must be >= 1 and <= 4096. Received: threads=0");
  const char* name = "unset";
  ASSERT_SUCCESS(fusedadam_threading_runtime, &name);
  EXPECT_EQ(name, threading_runtime());
  for (std::size_t i = 0; i < isas().size(); ++i) {
    ASSERT_SUCCESS(fusedadam_supported_isa, i, &name);
    EXPECT_EQ(name, isas()[i]);
    ASSERT_SUCCESS(fusedadam_set_isa, name);
    ASSERT_SUCCESS(fusedadam_active_isa, &name);
    EXPECT_EQ(name, isas()[i]);
  }
  set_isa(isas()[0]);
  ASSERT_SUCCESS(fusedadam_supported_isa, isas().size(), &name);
  EXPECT_EQ(name, nullptr);
  EXPECT_TRUE(said(fusedadam_set_isa, "sse9").starts_with("1 name must name an instruction set"));
}

TEST(CVersion, IsTheSameAsATextAndAsANumber) {
  const std::int32_t number = fusedadam_version_number();
  EXPECT_EQ(fusedadam_version(), std::to_string(number / 10000) + '.' +
                                     std::to_string(number / 100 % 100) + '.' +
                                     std::to_string(number % 100));
  EXPECT_EQ(fusedadam_abi_version(), FUSEDADAM_ABI_VERSION);
}

// ---- errors ------------------------------------------------------------------------------------

TEST(CErrors, LeaveEverythingAsItWas) {
  Groups arrays{{{trained_arrays<float>(100, 1)}, everything},
                {{trained_arrays<double>(10, 2), trained_arrays<double>(20, 3)}, everything}};
  const Groups before = arrays;
  const AdamProgress start{.iterations = 3};
  fusedadam_progress progress = progress_of(start);
  std::int32_t outcome = -1;
  const auto refused = [&](auto spoil) {
    Given given(arrays);
    spoil(given);
    return said(fusedadam_step, given.groups.data(), given.groups.size(), &progress, &outcome);
  };
  // Tensors are numbered in all groups together.
  EXPECT_EQ(refused([](Given& given) { given.tensors[1][1].m.data = nullptr; }),
            "1 tensors[2].m must not be null. Received: null, size=20");
  EXPECT_EQ(refused([](Given& given) { given.tensors[1][1].ema.type = 6; }),
            "1 tensors[2].ema.type must be a type of elements, FUSEDADAM_FLOAT32 to "
            "FUSEDADAM_INT16. Received: 6");
  EXPECT_EQ(refused([](Given& given) { given.tensors[0][0].grad.type = -1; }),
            "1 tensors[0].grad.type must be a type of elements, FUSEDADAM_FLOAT32 to "
            "FUSEDADAM_INT16. Received: -1");
  EXPECT_EQ(refused([](Given& given) { given.groups[1].options = nullptr; }),
            "1 groups[1].options must not be null. Received: null");
  EXPECT_EQ(refused([](Given& given) { given.groups[0].tensors = nullptr; }),
            "1 tensors[0] must not be null. Received: null");
  const std::int64_t negative = -1;
  EXPECT_EQ(refused([&](Given& given) { given.groups[1].steps = &negative; }),
            "1 groups[1].steps must be >= 0 and <= 2**53. Received: groups[1].steps=-1");
  EXPECT_EQ(refused([](Given& given) { given.groups[0].tensor_count = SIZE_MAX; })[0], '3');
  const Given given(arrays);
  fusedadam_progress* const none = nullptr;
  EXPECT_EQ(said(fusedadam_step, given.groups.data(), 2U, none, &outcome),
            "1 progress must not be null. Received: null");
  EXPECT_TRUE(same_bits(arrays, before));
  EXPECT_EQ(progress_of(progress), start);
  EXPECT_EQ(outcome, -1);
}

TEST(CErrors, OfSparseTensorsAndOfTheNorm) {
  Arrays<float> arrays = trained_arrays<float>(6, 1);
  const fusedadam_tensor table = tensor_of(arrays);
  const std::int64_t indices[] = {1};
  const float numbers[] = {1, 2, 3};
  const Options options = new_options();
  fusedadam_progress progress = FUSEDADAM_PROGRESS_INIT;
  std::int32_t outcome = -1;
  fusedadam_sparse_tensor tensor = FUSEDADAM_SPARSE_TENSOR_INIT;
  tensor.table = &table;
  tensor.row_size = 3;
  tensor.indices = indices;
  tensor.index_bits = 64;
  tensor.index_count = 1;
  tensor.grad_rows.data = const_cast<float*>(numbers);
  const auto refused = [&](std::int32_t mode, auto member, auto value) {
    fusedadam_sparse_tensor spoilt = tensor;
    spoilt.*member = value;
    return said(fusedadam_step_sparse, &spoilt, options.get(), mode, &progress, &outcome);
  };
  using S = fusedadam_sparse_tensor;
  EXPECT_EQ(refused(FUSEDADAM_LAZY, &S::index_bits, 16),
            "1 index_bits must be 32 or 64. Received: 16");
  EXPECT_EQ(refused(FUSEDADAM_LAZY, &S::index_count, -1),
            "1 index_count must be >= 0. Received: -1");
  EXPECT_EQ(refused(FUSEDADAM_LAZY, &S::table, nullptr),
            "1 table must not be null. Received: null");
  EXPECT_EQ(refused(FUSEDADAM_LAZY, &S::row_size, 4),
            "1 row_size must be >= 1 and divide table.size, 6. Received: row_size=4");
  EXPECT_EQ(refused(2, &S::row_size, 3),
            "1 mode must be FUSEDADAM_LAZY or FUSEDADAM_DENSE. Received: 2");
  EXPECT_EQ(refused(FUSEDADAM_DENSE, &S::row_size, 3), "0 ");

  fusedadam_const_array array = FUSEDADAM_CONST_ARRAY_INIT;
  double norm = -1;
  array.type = FUSEDADAM_INT8;
  EXPECT_EQ(said(fusedadam_global_norm, &array, 1U, &norm),
            "1 arrays[0].type must be FUSEDADAM_FLOAT32, _FLOAT64, _FLOAT16 or _BFLOAT16. "
            "Received: 4");
  array.size = -1;
  EXPECT_EQ(said(fusedadam_global_norm, &array, 1U, &norm),
            "1 arrays[0].size must be >= 0. Received: -1");
  EXPECT_EQ(norm, -1);
}

TEST(CErrors, AreCutWhereTheBufferEnds) {
  const std::string whole = "threads must be >= 1 and <= 4096. Received: threads=0";
  for (const std::size_t size : {1U, 2U, 10U, 53U, 54U, 60U}) {
    std::string buffer(70, '#');
    EXPECT_EQ(fusedadam_set_num_threads(0, buffer.data(), size), FUSEDADAM_INVALID_ARGUMENT);
    const std::string kept = whole.substr(0, size - 1);
    EXPECT_EQ(buffer.substr(0, kept.size() + 1), kept + '\0');
    EXPECT_EQ(buffer.find_first_not_of('#', kept.size() + 1), std::string::npos);
  }
  char none = '#';
  EXPECT_EQ(fusedadam_set_num_threads(0, nullptr, 10), FUSEDADAM_INVALID_ARGUMENT);
  EXPECT_EQ(fusedadam_set_num_threads(0, &none, 0), FUSEDADAM_INVALID_ARGUMENT);
  EXPECT_EQ(none, '#');
}

// ---- the binary interface ----------------------------------------------------------------------

// A struct of a newer header, whose last member this library does not know.
struct NewerArray {
  fusedadam_const_array known;
  std::int64_t added;
};

TEST(CStructs, MayBeLargerIfWhatIsNewIsZero) {
  const float numbers[] = {3, 4};
  constexpr std::size_t size = sizeof(NewerArray);
  NewerArray arrays[] = {{{size, numbers, FUSEDADAM_FLOAT32, 1}, 0},
                         {{size, numbers + 1, FUSEDADAM_FLOAT32, 1}, 0}};
  double norm = 0;
  ASSERT_SUCCESS(fusedadam_global_norm, &arrays[0].known, 2U, &norm);
  EXPECT_EQ(norm, 5);
  arrays[1].added = std::int64_t{1} << 63;
  EXPECT_EQ(
      said(fusedadam_global_norm, &arrays[0].known, 2U, &norm),
      "1 arrays[1] must have zeros where this version of the library knows no member: use the "
      "version of the header. Received: struct_size=" +
          std::to_string(size));
  arrays[1].known.struct_size = sizeof(fusedadam_const_array);
  const std::string rule =
      ".struct_size must be >= " + std::to_string(sizeof(fusedadam_const_array)) +
      " and <= 4096 bytes, as FUSEDADAM_..._INIT sets it, and the same in "
      "the whole array. Received: ";
  EXPECT_EQ(said(fusedadam_global_norm, &arrays[0].known, 2U, &norm),
            "1 arrays[1]" + rule + std::to_string(sizeof(fusedadam_const_array)));
  for (const std::size_t wrong :
       {std::size_t{0}, sizeof(fusedadam_const_array) - 1, std::size_t{4097}}) {
    arrays[0].known.struct_size = wrong;
    EXPECT_EQ(said(fusedadam_global_norm, &arrays[0].known, 2U, &norm),
              "1 arrays[0]" + rule + std::to_string(wrong));
  }
  EXPECT_EQ(norm, 5);
}

#if UINTPTR_MAX == UINT64_MAX
// A change breaks programs that were compiled before. New members come last, where no padding was.
TEST(CStructs, HaveTheLayoutOfThisVersionOfTheBinaryInterface) {
  using Layout = std::vector<std::size_t>;
#define AT(member) offsetof(S, member)
  {
    using S = fusedadam_array;
    EXPECT_EQ((Layout{AT(data), AT(type), sizeof(S)}), (Layout{0, 8, 16}));
  }
  {
    using S = fusedadam_tensor;
    EXPECT_EQ(
        (Layout{AT(struct_size), AT(param), AT(grad), AT(size), AT(m), AT(v), AT(packed),
                AT(low_bits), AT(vhat), AT(ema), AT(accumulator), AT(first_index), sizeof(S)}),
        (Layout{0, 8, 24, 40, 48, 64, 80, 96, 112, 128, 144, 160, 168}));
  }
  {
    using S = fusedadam_group;
    EXPECT_EQ(
        (Layout{AT(struct_size), AT(tensors), AT(tensor_count), AT(options), AT(steps), sizeof(S)}),
        (Layout{0, 8, 16, 24, 32, 40}));
  }
  {
    using S = fusedadam_progress;
    EXPECT_EQ((Layout{AT(struct_size), AT(iterations), AT(skipped_steps), AT(accumulated),
                      AT(dynamic_loss_scale), AT(good_steps), sizeof(S)}),
              (Layout{0, 8, 16, 24, 32, 40, 48}));
  }
  {
    using S = fusedadam_sparse_tensor;
    EXPECT_EQ((Layout{AT(struct_size), AT(table), AT(row_size), AT(indices), AT(index_bits),
                      AT(index_count), AT(grad_rows), sizeof(S)}),
              (Layout{0, 8, 16, 24, 32, 40, 48, 64}));
  }
  {
    using S = fusedadam_values;
    EXPECT_EQ((Layout{AT(struct_size), AT(param), AT(m), AT(v), AT(vhat), sizeof(S)}),
              (Layout{0, 8, 16, 24, 32, 40}));
  }
  {
    using S = fusedadam_const_array;
    EXPECT_EQ((Layout{AT(struct_size), AT(data), AT(type), AT(size), sizeof(S)}),
              (Layout{0, 8, 16, 24, 32}));
  }
#undef AT
}
#endif

}  // namespace
}  // namespace fusedadam
