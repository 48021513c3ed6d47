#pragma once

#include <c10/util/Exception.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace planmoe {

// Name -> factory. Filled by static objects (one per implementation file) while the module loads, read-only after.
template <class Interface, class... Arguments>
class Registry {
 public:
  using Factory = std::function<std::shared_ptr<Interface>(Arguments...)>;

  explicit Registry(std::string kind) : kind_(std::move(kind)) {}

  bool add(const std::string& name, Factory factory) {
    TORCH_CHECK(factories_.emplace(name, std::move(factory)).second, kind_, " '", name, "' is registered twice");
    return true;
  }

  // Throws ValueError naming every known implementation when `name` is not one of them.
  std::shared_ptr<Interface> create(const std::string& name, Arguments... arguments) const {
    auto found = factories_.find(name);
    TORCH_CHECK_VALUE(found != factories_.end(), "unknown ", kind_, " '", name, "'; known: ", joined_names());
    return found->second(std::forward<Arguments>(arguments)...);
  }

  std::vector<std::string> names() const {
    std::vector<std::string> result;
    for (const auto& entry : factories_) result.push_back(entry.first);
    return result;
  }

 private:
  std::string joined_names() const {
    std::string text;
    for (const auto& entry : factories_) text += (text.empty() ? "" : ", ") + entry.first;
    return text;
  }

  std::string kind_;
  std::map<std::string, Factory> factories_;
};

}  // namespace planmoe
