// A matrix by rows and the Python arrays it points into.
#pragma once
#include <nanobind/nanobind.h>

#include <vector>

#include "kernels.h"

namespace trimtab {

struct BoundRows {
    Matrix matrix;
    std::vector<nanobind::object> keep;
};

}  // namespace trimtab
