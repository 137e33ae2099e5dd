// Arguments of a call from Python, by name: each is taken where it is checked, and what nobody took
// is an error, so that a call cannot misspell one.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/bindings/checks.h"

namespace bft {

class Given {
  public:
    explicit Given(const pybind11::dict& named) : named_(named) {}

    template <typename T>
    T get(const char* name) {
        taken_.emplace_back(name);
        PyObject* found = PyDict_GetItemString(named_.ptr(), name);
        if (found == nullptr) throw pybind11::type_error(std::string(name) + ": is missing");
        try {
            return pybind11::cast<T>(pybind11::handle(found));
        } catch (const pybind11::cast_error&) {
            throw pybind11::type_error(std::string(name) + ": got a value of another type");
        }
    }
    template <typename T>
    T get(const char* name, T otherwise) {
        return named_.contains(name) ? get<T>(name) : otherwise;
    }
    int64_t number(const char* name, int64_t low, int64_t high) {
        return check_range(name, get<int64_t>(name), low, high);
    }
    // With `otherwise` outside of the range it must be given.
    float real(const char* name, float low, float high, float otherwise) {
        const float value = get(name, otherwise);
        check_number(name, value, low, high);
        return value;
    }
    // An array of `elements` T. Without a number of elements it may be missing: null.
    template <typename T>
    T* array(const char* name, int64_t elements = 0) {
        return checked_pointer<T>(name, get<std::uintptr_t>(name, 0), elements);
    }
    float* floats(const char* name, int64_t elements = 0) { return array<float>(name, elements); }
    int64_t* longs(const char* name, int64_t elements = 0) {
        return array<int64_t>(name, elements);
    }

    // All arguments must have been taken.
    void finish() const {
        for (const auto& [name, value] : named_) {
            const auto text = name.cast<std::string>();
            if (std::find(taken_.begin(), taken_.end(), text) == taken_.end()) {
                throw pybind11::type_error(text + ": there is no such argument");
            }
        }
    }
    // Calls function(arguments...), for which all must have been taken, without the GIL.
    template <typename Function, typename... Arguments>
    void call(Function function, const Arguments&... arguments) const {
        finish();
        const pybind11::gil_scoped_release unlocked;
        function(arguments...);
    }
    // The same with a stream behind them.
    template <typename Function, typename... Arguments>
    void launch(Function function, const Arguments&... arguments) {
        auto* stream = reinterpret_cast<void*>(get<std::uintptr_t>("stream"));
        call(function, arguments..., stream);
    }

  private:
    const pybind11::dict& named_;
    std::vector<std::string_view> taken_;
};

}  // namespace bft
