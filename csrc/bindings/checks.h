// Argument checks of the bindings. Kernels trust their arguments, so those that come from Python
// are checked here. std::invalid_argument becomes ValueError.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace bft {

inline int64_t check_range(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) {
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) +
                                    ", expected a number from " + std::to_string(low) + " to " +
                                    std::to_string(high));
    }
    return value;
}

// Refuses NaN too.
inline void check_number(const char* name, float value, float low, float high) {
    if (!(value >= low && value <= high)) {
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) +
                                    ", expected a number from " + std::to_string(low) + " to " +
                                    std::to_string(high));
    }
}

// The address of an array of `elements` T as a pointer. An empty array may have no address: torch
// gives 0 for one.
template <typename T>
T* checked_pointer(const char* name, std::uintptr_t address, int64_t elements) {
    if ((address == 0 && elements > 0) || address % alignof(T) != 0) {
        throw std::invalid_argument(std::string(name) + ": got address " + std::to_string(address) +
                                    ", expected a multiple of " + std::to_string(alignof(T)) +
                                    " other than 0, of " + std::to_string(elements) + " elements");
    }
    return reinterpret_cast<T*>(address);
}

// Arguments of a call from Python, by name. Each argument is marked as taken when it is read; an
// argument that nothing read is an error, so that a call cannot misspell one.
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
    // If `otherwise` is outside of the range, the argument must be given.
    float real(const char* name, float low, float high, float otherwise) {
        const float value = get(name, otherwise);
        check_number(name, value, low, high);
        return value;
    }
    // An array of `elements` T. Without a number of elements it may be missing, and is then null.
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
    // The same, with the stream as the last argument.
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
