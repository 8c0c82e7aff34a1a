#include <fusedadam/fusedadam.h>
#include <stdio.h>

int main(void) {
  static float param[1000], grad[1000], m[1000], v[1000];
  for (int i = 0; i < 1000; ++i) param[i] = 1.0F, grad[i] = 0.1F;

  fusedadam_options* options;
  char error[300];
  if (fusedadam_options_create(&options, error, sizeof error)) return puts(error), 1;
  if (fusedadam_options_set_double(options, "lr", 0.01, error, sizeof error)) return puts(error), 1;

  const fusedadam_tensor tensor = {.struct_size = sizeof tensor,
                                   .param = {param, FUSEDADAM_FLOAT32},
                                   .grad = {grad, FUSEDADAM_FLOAT32},
                                   .size = 1000,
                                   .m = {m, FUSEDADAM_FLOAT32},
                                   .v = {v, FUSEDADAM_FLOAT32}};
  const fusedadam_group group = {
      .struct_size = sizeof group, .tensors = &tensor, .tensor_count = 1, .options = options};
  fusedadam_progress progress = FUSEDADAM_PROGRESS_INIT;
  for (int i = 0; i < 10; ++i) {
    if (fusedadam_step(&group, 1, &progress, NULL, error, sizeof error)) return puts(error), 1;
  }
  printf("%.4f\n", param[0]);
  fusedadam_options_free(options);
}
