// SPDX-License-Identifier: MIT
//
// One use of each kind of call, from C99.
#include <fusedadam/fusedadam.h>
#include <stdio.h>
#include <string.h>

static char message[200];

// The arguments that every call ends with.
#define MESSAGE message, sizeof message
#define REQUIRE(condition) \
  if (!(condition)) return printf("%d: %s\n%s\n", __LINE__, #condition, message), 0
#define SUCCEEDS(call) REQUIRE((call) == FUSEDADAM_OK)

static int has_options(fusedadam_options* options) {
  fusedadam_options* copy = NULL;
  const char* text = NULL;
  int64_t seed = 0;
  int32_t is_set = 1, flag = 0;
  double lr = 0;
  SUCCEEDS(fusedadam_options_set_double(options, "beta_1", 0.5, MESSAGE));
  SUCCEEDS(fusedadam_options_set_int64(options, "seed", 7, MESSAGE));
  SUCCEEDS(fusedadam_options_set_bool(options, "skip_nonfinite", 1, MESSAGE));
  SUCCEEDS(fusedadam_options_set_text(options, "moments", "auto", MESSAGE));
  SUCCEEDS(fusedadam_options_copy(options, &copy, MESSAGE));
  SUCCEEDS(fusedadam_options_reset(copy, "moments", MESSAGE));
  SUCCEEDS(fusedadam_options_get_double(copy, "lr", &lr, MESSAGE));
  SUCCEEDS(fusedadam_options_get_int64(copy, "seed", &seed, MESSAGE));
  SUCCEEDS(fusedadam_options_get_bool(copy, "skip_nonfinite", &flag, MESSAGE));
  SUCCEEDS(fusedadam_options_get_text(copy, "moments", &text, MESSAGE));
  SUCCEEDS(fusedadam_options_is_set(copy, "clipnorm", &is_set, MESSAGE));
  REQUIRE(lr == 0.001 && seed == 7 && flag == 1 && strcmp(text, "float32") == 0 && !is_set);
  fusedadam_options_free(copy);
  return 1;
}

// Two groups, each with a tensor of one precision and its own count.
static int steps(const fusedadam_options* options) {
  float p[] = {1, 2}, g[] = {3, 4}, m[2] = {0}, v[2] = {0};
  double q[] = {3}, h[] = {12}, qm[1] = {0}, qv[1] = {0}, norm = 0;
  const int64_t steps = 0;
  int32_t outcome = -1;
  fusedadam_tensor tensors[2] = {FUSEDADAM_TENSOR_INIT, FUSEDADAM_TENSOR_INIT};
  fusedadam_group groups[2] = {FUSEDADAM_GROUP_INIT, FUSEDADAM_GROUP_INIT};
  fusedadam_progress progress = FUSEDADAM_PROGRESS_INIT;
  const fusedadam_const_array grads[] = {{sizeof grads[0], g, FUSEDADAM_FLOAT32, 2},
                                         {sizeof grads[0], h, FUSEDADAM_FLOAT64, 1}};
  const fusedadam_array doubles[] = {{q, FUSEDADAM_FLOAT64},
                                     {h, FUSEDADAM_FLOAT64},
                                     {qm, FUSEDADAM_FLOAT64},
                                     {qv, FUSEDADAM_FLOAT64}};
  SUCCEEDS(fusedadam_global_norm(grads, 2, &norm, MESSAGE));
  REQUIRE(norm == 13);
  tensors[0].param.data = p;
  tensors[0].grad.data = g;
  tensors[0].m.data = m;
  tensors[0].v.data = v;
  tensors[0].size = 2;
  tensors[1].param = doubles[0];
  tensors[1].grad = doubles[1];
  tensors[1].m = doubles[2];
  tensors[1].v = doubles[3];
  tensors[1].size = 1;
  for (int i = 0; i < 2; ++i) {
    groups[i].tensors = &tensors[i];
    groups[i].tensor_count = 1;
    groups[i].options = options;
  }
  groups[1].steps = &steps;
  SUCCEEDS(fusedadam_step(groups, 2, &progress, &outcome, MESSAGE));
  REQUIRE(outcome == FUSEDADAM_TAKEN && progress.iterations == 1);
  REQUIRE(m[0] == 1.5F && m[1] == 2 && qm[0] == 6 && p[0] < 1 && q[0] < 3);
  tensors[1].v.data = NULL;
  REQUIRE(fusedadam_step(groups, 2, &progress, NULL, MESSAGE) == FUSEDADAM_INVALID_ARGUMENT);
  REQUIRE(strcmp(message, "tensors[1].v must not be null. Received: null, size=1") == 0);
  REQUIRE(m[0] == 1.5F && progress.iterations == 1);
  return 1;
}

// A row of a table in bfloat16, whose moments are read as floats.
static int rows(const fusedadam_options* options) {
  uint16_t table[] = {0x3f80, 0x3f80}, m[2] = {0}, v[2] = {0};
  float grad_rows[] = {2}, values[2] = {9, 9};
  const int32_t indices[] = {1};
  int32_t outcome = -1;
  fusedadam_tensor tensor = FUSEDADAM_TENSOR_INIT;
  fusedadam_sparse_tensor sparse = FUSEDADAM_SPARSE_TENSOR_INIT;
  fusedadam_progress progress = FUSEDADAM_PROGRESS_INIT;
  fusedadam_values to = FUSEDADAM_VALUES_INIT;
  tensor.param.data = table;
  tensor.m.data = m;
  tensor.v.data = v;
  tensor.param.type = tensor.m.type = tensor.v.type = FUSEDADAM_BFLOAT16;
  tensor.size = 2;
  sparse.table = &tensor;
  sparse.row_size = 1;
  sparse.indices = indices;
  sparse.index_bits = 32;
  sparse.index_count = 1;
  sparse.grad_rows.data = grad_rows;
  SUCCEEDS(fusedadam_step_sparse(&sparse, options, FUSEDADAM_LAZY, &progress, &outcome, MESSAGE));
  to.m = values;
  SUCCEEDS(fusedadam_read_values(&tensor, options, &to, MESSAGE));
  REQUIRE(values[0] == 0 && values[1] == 1 && table[0] == 0x3f80);
  to.param = values;
  to.m = NULL;
  SUCCEEDS(fusedadam_write_values(&tensor, options, &to, MESSAGE));
  REQUIRE(table[0] == 0 && table[1] == 0x3f80);
  return 1;
}

static int describes_itself(void) {
  const char *isa = NULL, *best = NULL, *runtime = NULL;
  SUCCEEDS(fusedadam_active_isa(&isa, MESSAGE));
  SUCCEEDS(fusedadam_supported_isa(0, &best, MESSAGE));
  SUCCEEDS(fusedadam_set_isa(best, MESSAGE));
  SUCCEEDS(fusedadam_threading_runtime(&runtime, MESSAGE));
  SUCCEEDS(fusedadam_set_num_threads(2, MESSAGE));
  REQUIRE(fusedadam_get_num_threads() == 2);
  REQUIRE(fusedadam_abi_version() == FUSEDADAM_ABI_VERSION);
  printf("%s (%d): %s, %s\n", fusedadam_version(), (int)fusedadam_version_number(), isa, runtime);
  return 1;
}

int main(void) {
  fusedadam_options* options = NULL;
  int good = fusedadam_options_create(&options, MESSAGE) == FUSEDADAM_OK && has_options(options) &&
             steps(options) && rows(options) && describes_itself();
  fusedadam_options_free(options);
  puts(good ? "ok" : "FAILED");
  return good ? 0 : 1;
}
