// zfp_codec: encodes a file of raw values into a zfp stream, or decodes one.
#include <planmoe_zfp/zfp.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace zfp = planmoe::zfp;

namespace {

constexpr const char* kUsage =
    "usage: zfp_codec encode|decode TYPE SHAPE RATE INPUT OUTPUT\n"
    "  TYPE   float32, float16 or bfloat16: raw little-endian values\n"
    "  SHAPE  WIDTH, WIDTHxHEIGHT (WIDTH varies fastest) or rows:ROWSxHIDDEN\n"
    "  RATE   bits per value\n"
    "The stream has no header: decode with the type, shape and rate it was encoded with.\n";

struct Shape {
  bool is_rows = false;
  zfp::Field field;
  zfp::Rows rows;
  std::size_t num_value_bytes = 0;
};

void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

void require(zfp::Status status) { require(status == zfp::Status::kOk, zfp::describe(status)); }

zfp::DataType parse_type(const std::string& text) {
  if (text == "float32") return zfp::DataType::kFloat32;
  if (text == "float16") return zfp::DataType::kFloat16;
  require(text == "bfloat16", "type '" + text + "' is not float32, float16 or bfloat16");
  return zfp::DataType::kBFloat16;
}

std::size_t parse_size(const std::string& text, const std::string& shape) {
  const bool is_number = !text.empty() && text.size() < 19 && text.find_first_not_of("0123456789") == text.npos;
  require(is_number, "shape '" + shape + "' is not WIDTH, WIDTHxHEIGHT or rows:ROWSxHIDDEN");
  return std::stoull(text);
}

std::size_t checked_product(std::size_t a, std::size_t b) {
  require(b == 0 || a <= std::numeric_limits<std::size_t>::max() / 4 / b, "shape is too large");
  return a * b;
}

Shape parse_shape(const std::string& text, zfp::DataType type) {
  Shape shape;
  shape.is_rows = text.rfind("rows:", 0) == 0;
  const std::string sizes = shape.is_rows ? text.substr(5) : text;
  const std::size_t cross = sizes.find('x');
  const std::size_t first = parse_size(sizes.substr(0, cross), text);
  const bool is_line = cross == sizes.npos && !shape.is_rows;
  const std::size_t second = is_line ? 1 : parse_size(cross == sizes.npos ? "" : sizes.substr(cross + 1), text);
  shape.field = {is_line ? 1 : 2, first, second, type};
  shape.rows = {first, second, type};
  shape.num_value_bytes = checked_product(first, second) * (type == zfp::DataType::kFloat32 ? 4 : 2);
  return shape;
}

double parse_rate(const std::string& text) {
  char* end = nullptr;
  const double rate = std::strtod(text.c_str(), &end);
  require(!text.empty() && *end == '\0', "rate '" + text + "' is not a number");
  return rate;
}

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  require(file.good(), "cannot read '" + path + "'");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write_file(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  require(file.flush().good(), "cannot write '" + path + "'");
}

std::vector<char> encode(const Shape& shape, const zfp::Options& options, const std::vector<char>& input) {
  require(input.size() == shape.num_value_bytes, "the input has " + std::to_string(input.size()) +
                                                     " bytes, but type and shape say " +
                                                     std::to_string(shape.num_value_bytes));
  std::size_t bytes = 0;
  require(shape.is_rows ? zfp::row_bytes(shape.rows.hidden, options.rate, bytes)
                        : zfp::stream_bytes(shape.field, options.rate, bytes));
  std::vector<char> stream(shape.is_rows ? checked_product(shape.rows.num_rows, bytes) : bytes);
  require(shape.is_rows ? zfp::encode_rows(shape.rows, options, input.data(), stream.data(), stream.size())
                        : zfp::encode(shape.field, options, input.data(), stream.data(), stream.size()));
  return stream;
}

std::vector<char> decode(const Shape& shape, const zfp::Options& options, const std::vector<char>& input) {
  std::vector<char> values(shape.num_value_bytes);
  require(shape.is_rows ? zfp::decode_rows(shape.rows, options, input.data(), input.size(), values.data())
                        : zfp::decode(shape.field, options, input.data(), input.size(), values.data()));
  return values;
}

void run(const std::vector<std::string>& arguments) {
  require(arguments.size() == 6, kUsage);
  const std::string& action = arguments[0];
  require(action == "encode" || action == "decode", "action '" + action + "' is not encode or decode");
  const Shape shape = parse_shape(arguments[2], parse_type(arguments[1]));
  zfp::Options options;
  options.rate = parse_rate(arguments[3]);
  const std::vector<char> input = read_file(arguments[4]);
  const std::vector<char> output = action == "encode" ? encode(shape, options, input) : decode(shape, options, input);
  write_file(arguments[5], output);
  std::cout << input.size() << " -> " << output.size() << " bytes\n";
}

}  // namespace

int main(int count, char** arguments) {
  try {
    run({arguments + 1, arguments + count});
  } catch (const std::exception& error) {
    std::cerr << "zfp_codec: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
